"""Computes the SHA-256 of structured values, and of files until they change."""

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
HASH_VERSION = 2  # raise it when `value_sha256`, or what is hashed with it, changes


def value_sha256(kind: str, value: Any) -> str:
    """Return the SHA-256 of a value's structure and content. kind: what it is, part of the hash.

    The value consists of None, booleans, numbers, strings, bytes, lists, tuples and dictionaries
    with strings as keys. Values that differ in a type or a boundary have different hashes; a tuple
    is a list, and the order of a dictionary does not matter. Raises TypeError for other types.
    """
    text = json.dumps([HASH_VERSION, kind, _tagged(value)], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _tagged(value: Any) -> Any:
    """Return a value for JSON in which each leaf and container has its type.

    >>> _tagged({"b": [1, 1.0], "a": None})
    ['dict', [['a', None], ['b', ['list', [['int', '1'], ['float', '0x1.0000000000000p+0']]]]]]
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return ["int", str(value)]
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, list | tuple):
        return ["list", [_tagged(item) for item in value]]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return ["dict", [[name, _tagged(value[name])] for name in sorted(value)]]
    raise TypeError(f"a hash of {type(value).__name__} is not defined")


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
