"""Computes the SHA-256 of files, and caches it until a file changes."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import UserError

# If a file changed less than this before it was read, a later change may leave the same time stamp.
# FAT's time stamps have steps of two seconds.
UNSETTLED_NANOSECONDS = 3 * 10**9


def file_sha256(file: Path, memory: Path | None = None) -> str:
    """Return the SHA-256 of a file; raises UserError if it cannot be read.

    memory: a file that caches hashes. An entry is valid while the file's path, size, inode, mtime
    and ctime stay equal. No program can set ctime back. The hash of a file that has just changed is
    not cached.
    """
    try:
        before = _state(file)
        known = _remembered(memory).get(str(file.resolve()))
        if isinstance(known, dict) and known.get("state") == before:
            return str(known["sha256"])
        with open(file, "rb") as opened:
            began = time.time_ns()
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        settled = began - max(before[2:4]) > UNSETTLED_NANOSECONDS
        if memory and settled and _state(file) == before:
            _remember(memory, str(file.resolve()), {"state": before, "sha256": found})
        return found
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None


def _state(file: Path) -> list[int]:
    found = os.stat(file)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _remembered(memory: Path | None) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8")) if memory else {}
    except (OSError, ValueError):
        return {}  # without a readable cache, all files are read
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, name: str, entry: dict[str, Any]) -> None:
    """Add an entry if the cache can be written; if several processes write, the last one wins."""
    partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_remembered(memory) | {name: entry}), encoding="utf-8")
        partial.replace(memory)
