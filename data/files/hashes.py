"""SHA-256 of files, remembered for as long as a file is the one that was read."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import UserError

# A file that changed so shortly before it was read may have changed once more meanwhile, with the
# same time: some file systems count in steps of two seconds (FAT).
UNSURE = 3 * 10**9  # nanoseconds


def file_sha256(file: Path, memory: Path | None = None) -> str:
    """Return the SHA-256 of a file; raises UserError where it cannot be read.

    memory: a file that keeps it, so that a file that has not changed need not be read again. What
    tells it: name, size, inode, and the times of its content and of its inode, which nobody can set
    back. One that changed just now is read again next time.
    """
    try:
        before = _state(file)
        known = _remembered(memory).get(str(file.resolve()))
        if isinstance(known, dict) and known.get("state") == before:
            return str(known["sha256"])
        with open(file, "rb") as opened:
            began = time.time_ns()
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        settled = began - max(before[2:4]) > UNSURE
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
        return {}  # none yet, or none of use: the files are read
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, name: str, fact: dict[str, Any]) -> None:
    """Add a fact, if that can be written; of several processes the last one's stay."""
    partial = memory.with_name(f"{memory.name}.{os.getpid()}.partial")
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_remembered(memory) | {name: fact}), encoding="utf-8")
        partial.replace(memory)
