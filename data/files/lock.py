"""A lock file that one process holds at a time; the kernel releases it when the process ends."""

import fcntl
import getpass
import math
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import TextIO

POLL_SECONDS = 0.1


class LockHeld(Exception):
    """Another process holds the lock; the text names it: process, user, machine, start."""


@contextmanager
def locked(path: Path, timeout: float = math.inf, unlink: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a file while the block runs; yield False if there are no locks.

    The file and its folder are created. The file holds the name of its last holder. Some network
    file systems have no locks: there the block runs without one.

    timeout: seconds to wait for another holder. unlink: remove the file at the end.
    Raises LockHeld after the timeout, OSError if the file cannot be created.
    """
    deadline = time.monotonic() + timeout
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            has_lock = _flock(file, deadline)
            # A holder may have unlinked the file since it was opened. A lock on that inode excludes
            # nobody: the next process creates another file under the same path.
            if has_lock and not _is_at(file, path):
                continue
            # A worker that multiprocessing forks inherits the lock, and would keep it after a kill
            # of its parent.
            register_after_fork(file, lambda inherited: inherited.close())
            file.truncate(0)
            file.write(_holder())
            file.flush()
            try:
                yield has_lock
            finally:
                if unlink:  # before the lock is released: afterwards the file is another holder's
                    with suppress(OSError):
                        path.unlink()
            return


def _flock(file: TextIO, deadline: float) -> bool:
    """Wait for the lock; return False on a file system without locks; raises LockHeld."""
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                raise LockHeld(file.read().strip()) from None
            time.sleep(POLL_SECONDS)
        except OSError:
            return False


def _is_at(file: TextIO, path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _holder() -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} of {_user()} on {platform.node()}, since {now}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())
