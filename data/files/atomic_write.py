"""Files that are written whole or not at all, and never over what was read."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.errors import UserError


@contextmanager
def written_whole(path: Path, flag: str) -> Iterator[Path]:
    """Yield a file beside the path, which takes its place if nothing is raised, else goes.

    It is made at once, so that what cannot be written is told before the work. Raises UserError.
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
    """Return the path without links; one that leads to itself stays, to be told when it is read."""
    return Path(os.path.realpath(path))


def check_output(flag: str, path: Path, taken: dict[Path, str]) -> None:
    """Raise UserError for a folder, or a file that is `taken` (resolved, by what it is)."""
    found = "a folder" if path.is_dir() else taken.get(place_of(path))
    if found is None and path.exists():  # by another name: a hard link
        found = next((what for file, what in taken.items() if _same(file, path)), None)
    if found:
        raise UserError(f"{flag} {path}: it is {found}. Give another file.")


def _same(file: Path, path: Path) -> bool:
    return file.exists() and file.samefile(path)
