"""`python -m data look`: prints in ten lines what a file of dialogues holds."""

import argparse
import hashlib
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.dialogues.conversation import Dialogue, Turn
from data.dialogues.exports import export_of
from data.dialogues.forms import recognise
from data.dialogues.keys import is_meaningful, unused_keys
from data.dialogues.sharegpt import Tally, dialogues_of
from data.dialogues.turns import ROLE_KEYS, ROLES
from data.errors import BadRecord, UserError, printable
from data.files.containers import check_encoding
from data.files.names import COMPRESSIONS
from data.files.read import find_files, kind_of, placed_records
from data.preparation.parallel import characters

RECORDS = 5_000  # that are read by default
MOST_CHARACTERS = 8 << 20  # of all records that are read
SHOWN_CHARACTERS = 60  # of each text of the first dialogue
SHOWN_TURNS = 2
SHOWN_NAMES = 12  # in a line


@dataclass
class Look:
    """Counts of the records of a file.

    container: notes on the files by the number of files.
    used, unused: records with this field. roles: turns by the role's name in the file. lengths:
    dialogues by their number of turns. systems: dialogues by the digest of their system text.
    tools: dialogues by the name of a tool. reasoned: answers with reasoning. all_read: whether
    the file has no further records.
    """

    tally: Tally = field(default_factory=Tally)
    container: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    used: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    systems: Counter[bytes] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    with_tools: int = 0
    calls: int = 0
    results: int = 0
    reasoned: int = 0
    answers: int = 0
    supervised: int = 0
    first: Dialogue | None = None
    all_read: bool = True

    def add_record(self, record: Any) -> None:
        """Count a parsed value's form and fields."""
        if isinstance(record, BadRecord):
            self.forms["damaged"] += 1
            return
        form, keys = form_of(record)
        self.forms[form] += 1
        record = {"messages": record} if isinstance(record, list) else record
        if not isinstance(record, dict):
            return
        unused = {*unused_keys(record, keys | {"messages"})}
        for name in _fields(record):
            (self.unused if name in unused else self.used)[name] += 1
        self.roles.update(_role_names(record))

    def add(self, dialogue: Dialogue) -> None:
        """Count the turns of a dialogue."""
        self.first = self.first or dialogue
        self.tally.kept += 1
        self.lengths[len(dialogue.turns)] += 1
        if dialogue.system is not None:
            self.systems[hashlib.sha256(dialogue.system.encode("utf-8", "replace")).digest()] += 1
        self.with_tools += bool(dialogue.tools)
        self.tools.update({str(_tool_name(tool)) for tool in dialogue.tools})
        for turn in dialogue.turns:
            self.calls += len(turn.calls)
            self.results += turn.role == "tool"
            self.reasoned += bool(turn.reasoning) or "</think>" in turn.text
            self.answers += turn.role == "assistant"
            self.supervised += turn.role == "assistant" and turn.supervised


def look(files: list[Path], most: int) -> Look:
    """Read at most `most` records of files; raises UserError if they cannot be read."""
    found = Look()

    def given() -> Iterator[tuple[Any, str]]:
        size = 0
        for file in files:
            for record, place in placed_records(file, found.container):
                if found.tally.read >= most or size > MOST_CHARACTERS:
                    found.all_read = False
                    return
                size += characters(record)
                found.add_record(record)
                yield record, place

    for dialogue in dialogues_of(given(), found.tally, "skip"):
        found.add(dialogue)
    return found


def form_of(record: Any) -> tuple[str, frozenset[str]]:
    """Return the form of a record with the field that decided it, and the fields that it reads."""
    if export := export_of(record):
        return export, frozenset()
    try:
        form = recognise(record)
    except BadRecord:
        return "unknown", frozenset()
    return f'{form.name}, by "{form.field}"', form.keys


def _fields(record: dict[str, Any]) -> Iterator[str]:
    """Yield the filled fields of a record; those of the objects in a list are `list.field`."""
    for key, value in record.items():
        if value in (None, "", [], {}):
            continue
        objects = [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
        inner = dict.fromkeys(
            str(name)
            for one in objects
            for name, filled in one.items()
            if filled not in (None, "", [], {})
        )
        if inner and _is_turns(value):
            yield from (f"{key}.{name}" for name in inner)
        else:
            yield str(key)


def _is_turns(value: list[Any]) -> bool:
    return any(isinstance(one, dict) and one.keys() & {*ROLE_KEYS} for one in value)


def _role_names(record: dict[str, Any]) -> Iterator[str]:
    """Yield the role's name of each turn, as it stands in the record."""
    for value in record.values():
        for turn in value if isinstance(value, list) else ():
            names = [turn.get(key) for key in ROLE_KEYS] if isinstance(turn, dict) else []
            yield from (name for name in names if isinstance(name, str))


def _tool_name(tool: dict[str, Any]) -> Any:
    function = tool.get("function")
    return (function if isinstance(function, dict) else tool).get("name")


def lines(path: Path, files: list[Path], found: Look) -> list[str]:
    """Return the ten lines that describe a file."""
    read, kept = found.tally.read, found.tally.kept
    amount = "all" if found.all_read else "the first"
    rows = {
        "container": container(path, files, found.container),
        "form": _counted(found.forms, read),
        "records": f"{read:,} ({amount}), {_number(kept, 'dialogue')}",
        "fields": f"used: {_counted(found.used, read) or 'none'}; unused: {_unused(found, read)}",
        "turns": _turns(found),
        "systems": _systems(found),
        "tools": _tools(found),
        "reasoning": f"in {found.reasoned:,} of {found.answers:,} answers" * bool(found.reasoned),
        "first": _rendered(found.first) if found.first else "",
        "dropped": _dropped(found.tally),
    }
    return [f"{name:10} {printable(text) or 'none'}" for name, text in rows.items()]


def container(path: Path, files: list[Path], notes: Counter[str]) -> str:
    """Return a path with its kind of file, its size, and how it was read."""
    size = sum(file.stat().st_size for file in files)
    kinds = ", ".join(dict.fromkeys(map(_kind, files)))
    said = "".join(f"; {note}" for note in notes if note)
    several = f"{_number(len(files), 'file')}, " if files != [path] else ""
    return f"{path}: {several}{kinds}, {_size(size)}{said}"


def _kind(file: Path) -> str:
    names = {".csv": "CSV", ".tsv": "TSV", ".parquet": "Parquet", ".arrow": "Arrow"}
    names |= {".feather": "Arrow", ".json": "JSON", ".zip": "zip"}
    packed = file.suffix.lower() if file.suffix.lower() in COMPRESSIONS else ""
    return names.get(kind_of(file) or ".json", "JSON Lines") + f" in {packed}" * bool(packed)


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _size(size: int) -> str:
    units = ("bytes", "KB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, (len(str(size)) - 1) // 3))
    return f"{size / 1000**power:.3g} {units[power]}" if power else f"{size} bytes"


def _counted(found: Counter[str], total: int) -> str:
    """Return the most frequent names; a count follows those that not all records have."""
    most = found.most_common(SHOWN_NAMES)
    named = [name if n == total else f"{name} ({n:,})" for name, n in most]
    return ", ".join(named) + ", …" * (len(found) > SHOWN_NAMES)


def _unused(found: Look, read: int) -> str:
    meaningful = [name for name in found.unused if is_meaningful(name)]
    note = f"; {', '.join(sorted(meaningful))} may change what is learnt" if meaningful else ""
    return (_counted(found.unused, read) or "none") + note


def _turns(found: Look) -> str:
    if not found.lengths:
        return ""
    total = sum(length * n for length, n in found.lengths.items())
    names = []
    for name, n in found.roles.most_common(SHOWN_NAMES):
        role = ROLES.get(name.lower(), "unknown")
        names.append(f"{name} {n:,}" + f" ({role})" * (role != name))
    shortest, longest = min(found.lengths), max(found.lengths)
    span = f"{longest:,}" if shortest == longest else f"{shortest:,} to {longest:,}"
    text = f"{total:,}, {span} in each dialogue"
    text += f"; roles: {', '.join(names)}" if names else ""
    return f"{text}; {found.supervised:,} of {found.answers:,} answers supervised"


def _systems(found: Look) -> str:
    if not found.systems:
        return ""
    count = found.systems.total()
    kept = _number(found.tally.kept, "dialogue")
    return f"in {count:,} of {kept}, {len(found.systems):,} different"


def _tools(found: Look) -> str:
    if not (found.with_tools or found.calls or found.results):
        return ""
    names = f" ({_counted(found.tools, -1)})" if found.tools else ""
    text = f"defined in {found.with_tools:,} of {_number(found.tally.kept, 'dialogue')}{names}"
    return f"{text}; {_number(found.calls, 'call')}, {_number(found.results, 'result')}"


def _rendered(dialogue: Dialogue) -> str:
    """Return the beginning of a dialogue in one line."""
    system = [] if dialogue.system is None else [("system", dialogue.system)]
    texts = [*system, *((turn.role, _text(turn)) for turn in dialogue.turns)]
    shown = texts[: SHOWN_TURNS + len(system)]
    parts = [f"{role}: {_short(text)}" for role, text in shown]
    return " | ".join(parts) + f" | … {len(texts) - len(shown)} more" * (len(texts) > len(shown))


def _text(turn: Turn) -> str:
    calls = "".join(f" [calls {call.name}]" for call in turn.calls)
    return (turn.text + calls).strip()


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + "…"


def _dropped(tally: Tally) -> str:
    causes = [
        f"{cause} {n:,} [{', '.join(tally.named.get(cause, []))}]"
        for cause, n in tally.dropped.most_common()
    ]
    text = f"{tally.dropped.total():,} with --on_bad_record skip: {', '.join(causes)}"
    noted = [f"{note} {n:,}" for note, n in sorted(tally.noted.items())]
    return "; ".join([*([text] if causes else []), *noted])


def flags() -> argparse.ArgumentParser:
    """Return the command's parser."""
    command = argparse.ArgumentParser(
        "python -m data look",
        usage="python -m data look FILE ... [--flag value ...]",
        description="Print in ten lines what each file of dialogues holds.",
        allow_abbrev=False,
    )
    command.add_argument("files", type=Path, nargs="+", metavar="FILE", help="files or folders")
    text = "read at most N records of each, and 8 million characters (default: %(default)s)"
    command.add_argument("--records", type=_count, default=RECORDS, metavar="N", help=text)
    text = "of text files, such as utf-16, cp1252 or gb18030 (default: UTF-8)"
    command.add_argument("--encoding", metavar="NAME", help=text)
    return command


def main(argv: list[str]) -> None:
    """Print the lines of each file; raises UserError for one without any dialogue."""
    given = flags().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    check_encoding(given.encoding)
    for number, path in enumerate(given.files):
        print("\n" * bool(number), end="")
        files = find_files([path], given.encoding)
        found = look(files, given.records)
        print("\n".join(lines(path, files, found)), flush=True)
        if not found.tally.kept:
            raise _unreadable(path, files)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"found {word}; expected a whole number above 0")
    return int(word)


def _unreadable(path: Path, files: list[Path]) -> UserError:
    """Return the error of the first record of files without a dialogue."""
    for file in files:
        try:
            deque(dialogues_of(placed_records(file), Tally()), maxlen=0)
        except UserError as error:
            return error
    return UserError(f"{path}: found no records; expected dialogues. Give another file.")
