"""Starts the project's commands warm: forked from a server that has imported the libraries.

Imports take most of the time of a small run. Every Python process that the tests start imports this
file first, because its folder is on PYTHONPATH. A command of the project (`accelerate launch`,
`loop/train.py`, `python -m loop`) sends its arguments, environment, folder and files to the server.
The server forks and runs the command. Other Python processes start as usual. With
`LORA_LOOP_WARM=""`, a command of the project also starts as usual (cold).
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
    """Return the words after the interpreter and its -u; empty for other Python processes."""
    words = [word for word in words[1:2] if word != "-u"] + words[2:]
    if words[:1] == ["-m"]:
        return words if words[1] in MODULES else []
    return words if words and words[0].endswith(SCRIPTS) else []


def hand_over(words: list[str]) -> None:
    """Let the server run the command; exit with its exit code or signal."""
    server = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 1800  # The server may still import the libraries.
    while server.connect_ex(SOCKET):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{SOCKET}: found no server; see the log in its folder")
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
    project_command = command_of(sys.orig_argv)
    if project_command:
        hand_over(project_command)
