"""Selects the training split of a folder, an archive or an object with several parts."""

import re
from collections.abc import Iterable
from pathlib import Path, PosixPath, PurePosixPath

from data.errors import UserError

# The words by which `datasets` recognises the split of a file.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "heldout"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SHARD = re.compile(r"[-_.]\d+([-_]of[-_]\d+)?$")
NAMES_SHOWN = 5


class DataFile(PosixPath):
    """A file of a source, with what its records need besides its path.

    part: the split to read of a file that holds several; None: the training split.
    encoding: of its text; None: UTF-8. note: a line for the account, counted once for each file.
    """

    part: str | None = None
    encoding: str | None = None
    note: str = ""

    @classmethod
    def of(
        cls, path: Path, part: str | None = None, encoding: str | None = None, note: str = ""
    ) -> "DataFile":
        """Return the path with its settings; those of a DataFile are kept where none is given."""
        made = cls(path)
        made.part = part or getattr(path, "part", None)
        made.encoding = encoding or getattr(path, "encoding", None)
        made.note = note or getattr(path, "note", "")
        return made


def split_of(name: str) -> str | None:
    """Return train, validation or test by the words of a relative path, None without such a word.

    The file's name decides before its folders.

    >>> split_of("data/train-00000-of-00002.parquet"), split_of("test_sft/a.json"), split_of("a")
    ('train', 'test', None)
    """
    for part in reversed(PurePosixPath(name).parts):
        words = re.split(r"[^a-z]+", part.lower())
        found = [SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS]
        if found:
            return found[0]
    return None


def split_names(name: str) -> set[str]:
    """Return all names by which `@split` selects a relative path."""
    path = PurePosixPath(name)
    stem = path.name.partition(".")[0]
    found = {*path.parts, stem, SHARD.sub("", stem)}
    kind = split_of(name)
    return found | ({kind} if kind else set())


def select_split(names: Iterable[str], wanted: str | None, owner: str) -> tuple[list[str], str]:
    """Return the names of the wanted split, in order, and a note for the account.

    Without a wanted split, parts for training are taken alone. Parts for validation and test are
    left out if there are others. Raises UserError for an unknown split.
    """
    names = [*names]
    shown = PurePosixPath(owner).name
    if {"users.json", "channels.json"} <= {PurePosixPath(name).name for name in names}:
        return names, f"files of {shown} ({listed(names)})"  # a Slack export: folders are channels
    if wanted is not None:
        chosen = [name for name in names if wanted in split_names(name)]
        if not chosen:
            raise UserError(unknown_split(owner, wanted, names))
        return chosen, f"files of {shown}, split {wanted} ({listed(chosen)})"
    kinds = {name: split_of(name) for name in names}
    if "train" in kinds.values():
        chosen = [name for name in names if kinds[name] == "train"]
    else:
        # A word within a name, such as test-driven.json, is a topic if nothing is called train.
        chosen = [name for name in names if not _is_held_out(name)]
    chosen = chosen or names
    left = [name for name in names if name not in {*chosen}]
    if not left:
        return chosen, f"files of {shown} ({listed(chosen)})"
    other = split_of(left[0]) or PurePosixPath(left[0]).name.partition(".")[0]
    read = f"files of {shown} ({listed(chosen)})"
    return chosen, f"{read} without {listed(left)}, which {owner}@{other} selects"


def unknown_split(owner: str, wanted: str, names: Iterable[str]) -> str:
    """Return the message for a split that does not exist."""
    known = sorted({split_of(name) or PurePosixPath(name).parts[0] for name in names})
    remedy = f"Give {owner}@{known[0]}." if known else f"Give {owner}."
    return f"{owner}@{wanted}: no such split; found {listed(known) or 'none'}. {remedy}"


def listed(names: Iterable[str]) -> str:
    """Return the first names, and the number of the others."""
    names = [*names]
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def without_split(path: Path) -> tuple[Path, str | None]:
    """Return the path and the split of `path@split`; a path that exists has no split."""
    head, mark, split = str(path).rpartition("@")
    if not mark or not split or "/" in split or path.exists() or not head:
        return path, None
    return (Path(head), split) if Path(head).exists() else (path, None)


def _is_held_out(name: str) -> bool:
    path = PurePosixPath(name)
    stem = SHARD.sub("", path.name.partition(".")[0]).lower()
    words = {stem, *(part.lower() for part in path.parts[:-1])}
    return bool({SPLIT_WORDS.get(word) for word in words} & {"validation", "test"})
