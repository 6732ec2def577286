"""Writes files atomically, and refuses output paths that are inputs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.errors import UserError


@contextmanager
def written_whole(path: Path, flag: str) -> Iterator[Path]:
    """Yield a temporary file; it replaces the path after the block, and is removed on an error.

    The file is created before the block, so that an unwritable path fails before the work. Raises
    UserError.
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
    """Return the path with links resolved, without an error for a link to itself."""
    return Path(os.path.realpath(path))


def check_output(flag: str, path: Path, taken: dict[Path, str]) -> None:
    """Raise UserError if the path is a folder, or a file that is used already.

    taken: a map of used files, as resolved paths, to their descriptions.
    """
    found = "a folder" if path.is_dir() else taken.get(place_of(path))
    if found is None and path.exists():  # a hard link has another path
        found = next((what for file, what in taken.items() if _same(file, path)), None)
    if found:
        raise UserError(f"{flag} {path}: the path is {found}. Give another file.")


def _same(file: Path, path: Path) -> bool:
    return file.exists() and file.samefile(path)
