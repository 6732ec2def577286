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
    """Another process holds the lock; the message has its process id, user, machine and start."""


@contextmanager
def locked(path: Path, timeout: float = math.inf, unlink: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock on a file while the block runs; yield whether there is a lock.

    The file and its folder are created. The file contains the name of its last holder. Some network
    file systems have no locks; on these, the block runs without a lock.

    timeout: seconds to wait for another holder. unlink: remove the file after the block.
    Raises LockHeld after the timeout, OSError if the file cannot be created.
    """
    deadline = time.monotonic() + timeout
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+", encoding="utf-8") as file:
            has_lock = _flock(file, deadline)
            # The last holder may have unlinked the file after it was opened here. A lock on that
            # inode is useless, because the next process creates another file at the path.
            if has_lock and not _is_at(file, path):
                continue
            # A forked worker of multiprocessing inherits the lock. It would keep the lock after its
            # parent is killed.
            register_after_fork(file, lambda inherited: inherited.close())
            file.truncate(0)
            file.write(_holder())
            file.flush()
            try:
                yield has_lock
            finally:
                if unlink:  # while the lock is held: later, the file may be another holder's
                    with suppress(OSError):
                        path.unlink()
            return


def _flock(file: TextIO, deadline: float) -> bool:
    """Wait for the lock; return whether the file system has locks. Raises LockHeld."""
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
    except (KeyError, OSError):  # the user of a container may have no name
        return str(os.getuid())
