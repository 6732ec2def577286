"""Starts the project's commands warm: forked from a process that has imported the libraries.

Every Python that the tests start imports this file first, since tests/conftest.py puts its folder
on PYTHONPATH. A command of the project (`accelerate launch`, `loop/train.py`, `python -m loop`)
then hands its arguments, environment, folder and files to the server, which forks itself and runs
the command there; whatever else Python is started for goes on as ever. Imports are most of a small
run's time. A test that is about the process itself starts it cold: `LORA_LOOP_WARM=""`.
"""

import json
import os
import signal
import socket
import sys
import time

SOCKET = os.environ.get("LORA_LOOP_WARM", "")
NAMES = ("asked", "fitted", "probed", "traced", "unchecked")
LOOPS = tuple(f"tests/support/{name}_train.py" for name in NAMES)
SCRIPTS = ("bin/accelerate", "loop/train.py", *LOOPS)
MODULES = ("accelerate.commands.launch", "loop")
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def command_of(words: list[str]) -> list[str]:
    """Return what follows the interpreter and its -u, where it is a command of the project."""
    words = [word for word in words[1:2] if word != "-u"] + words[2:]
    if words[:1] == ["-m"]:
        return words if words[1] in MODULES else []
    return words if words and words[0].endswith(SCRIPTS) else []


def hand_over(words: list[str]) -> None:
    """Have the server run the command; end as it ends."""
    server = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 1800  # The libraries are being imported.
    while server.connect_ex(SOCKET):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{SOCKET}: nobody listens; see the log beside it")
        time.sleep(0.05)
    body = json.dumps([words, dict(os.environ), os.getcwd()]).encode()
    network = os.open("/proc/self/ns/net", os.O_RDONLY)
    socket.send_fds(server, [len(body).to_bytes(4, "big")], [0, 1, 2, network])
    server.sendall(body)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    answer = server.recv(4)
    code = int.from_bytes(answer, "big", signed=True) if answer else 1
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if SOCKET and __name__ == "sitecustomize":
    found = command_of(sys.orig_argv)
    if found:
        hand_over(found)
