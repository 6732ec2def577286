"""Imports the libraries once, then forks for each command of a test.

python tests/support/warm_server.py SOCKET
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = (
    "torch.distributed.run",
    "accelerate.commands.launch",
    "transformers.models.llama.modeling_llama",
    "peft",
    "deepspeed",
    "matplotlib.backends.backend_agg",
)
Request = tuple[list[str], dict[str, str], str, list[int]]


def receive(client: socket.socket) -> Request:
    """Return a command's words, environment, folder and files: 0, 1, 2 and network namespace."""
    size, files, _, _ = socket.recv_fds(client, 4, 4)
    body = b""
    while len(body) < int.from_bytes(size, "big"):
        body += client.recv(1 << 20)
    words, environment, folder = json.loads(body)
    return words, environment, folder, files


def serve(address: str) -> Request:
    """Fork for each command until the tests end; only a fork returns, with its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    wait = selectors.DefaultSelector()
    wait.register(listener, selectors.EVENT_READ)
    wait.register(sys.stdin, selectors.EVENT_READ)
    while True:
        key, _ = wait.select()[
            0
        ]  # One event at a time, because it may close the file of another event.
        if key.fileobj is sys.stdin:
            sys.exit()
        if key.fileobj is listener:
            client, _ = listener.accept()
            request = receive(client)
            child = os.fork()
            if not child:
                listener.close()
                client.close()
                wait.close()
                return request
            for file in request[3]:
                os.close(file)
            wait.register(client, selectors.EVENT_READ, child)
            wait.register(os.pidfd_open(child), selectors.EVENT_READ, (child, client))
        elif isinstance(key.data, int):
            received = key.fileobj.recv(1)  # type: ignore[union-attr]
            os.kill(key.data, received[0] if received else signal.SIGKILL)
            if not received:  # The client was killed.
                wait.unregister(key.fileobj)
        else:
            child, client = key.data
            _, status = os.waitpid(child, 0)
            wait.unregister(key.fileobj)
            os.close(key.fd)
            with contextlib.suppress(OSError, KeyError):
                wait.unregister(client)
                code = os.waitstatus_to_exitcode(status)
                client.sendall(code.to_bytes(4, "big", signed=True))
            client.close()


def become(request: Request) -> None:
    """Run the command as a separate Python process would."""
    words, environment, folder, files = request
    for number, file in enumerate(files[:3]):
        os.dup2(file, number)
    if ctypes.CDLL(None, use_errno=True).setns(files[3], 0):
        raise OSError(ctypes.get_errno(), "setns")
    for file in files:
        os.close(file)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], folder
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # as loop/train.py does
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    become(serve(sys.argv[1]))
