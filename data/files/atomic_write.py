"""Writes files atomically, and refuses output paths that are inputs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.errors import UserError


@contextmanager
def written_whole(path: Path, flag: str) -> Iterator[Path]:
    """Yield a temporary file that replaces the path at the end, or is removed on an error.

    It is created at once: a path that cannot be written fails before the work. Raises UserError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        yield partial
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{flag} {path}: cannot be written: {error.strerror or error}. Give another file."
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def place_of(path: Path) -> Path:
    """Return the path without links; a link to itself stays, and fails when it is read."""
    return Path(os.path.realpath(path))


def check_output(flag: str, path: Path, taken: dict[Path, str]) -> None:
    """Raise UserError if the path is a folder or in `taken`: resolved path -> what it is."""
    found = "a folder" if path.is_dir() else taken.get(place_of(path))
    if found is None and path.exists():  # a hard link has another name
        found = next((what for file, what in taken.items() if _same(file, path)), None)
    if found:
        raise UserError(f"{flag} {path}: it is {found}. Give another file.")


def _same(file: Path, path: Path) -> bool:
    return file.exists() and file.samefile(path)
