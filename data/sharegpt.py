"""Reads and validates ShareGPT dialogues; every error names file, record and remedy."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from data.errors import UserError

Role = Literal["system", "user", "assistant"]
ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue."""

    role: Role
    text: str


@dataclass(frozen=True)
class Dialogue:
    """Alternating turns, the user's first; `id` is the record's own or its index in the file.

    `system` is the text of a leading system turn, which replaces the template's own.
    """

    id: str
    turns: tuple[Turn, ...]
    system: str | None = None


@dataclass
class Tally:
    """Where every record went: read = kept + dropped, always; `noted` counts what was altered."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)

    def drop(self, cause: str, records: int = 1) -> None:
        """Move records from kept to dropped."""
        self.kept -= records
        self.dropped[cause] += records

    def __str__(self) -> str:
        causes = ", ".join(f"{cause}: {count}" for cause, count in sorted(self.dropped.items()))
        text = f"read {self.read} = kept {self.kept} + dropped {self.dropped.total()}"
        text += f" ({causes})" if causes else ""
        return text + "".join(f"; {note}: {n}" for note, n in sorted(self.noted.items()))


class BadRecord(Exception):
    """A record that cannot be used: a countable cause, and what was found and expected."""

    def __init__(self, cause: str, explanation: str) -> None:
        super().__init__(explanation)
        self.cause = cause


def read_dialogues(
    path: Path,
    on_bad_record: Literal["fail", "skip"] = "fail",
    empty_answers: bool = False,
) -> tuple[list[Dialogue], Tally]:
    """Read a JSON array or JSONL file of ShareGPT records, with or without `empty_answers`.

    Raises UserError for an unreadable file and, unless `on_bad_record` is "skip", a bad record.
    """
    dialogues, tally = [], Tally()
    for index, record in _records(path):
        tally.read += 1
        try:
            dialogue, skipped_first = _parse_record(record, index, empty_answers)
        except BadRecord as bad:
            if on_bad_record == "fail":
                identity = _identity(record)
                raise UserError(
                    f"{path}: record {index}{identity}: {bad}. "
                    "Correct the record, or drop all such records with --on_bad_record skip."
                ) from None
            tally.dropped[bad.cause] += 1
            continue
        tally.kept += 1
        tally.noted.update(["first turn not human, skipped"] if skipped_first else [])
        dialogues.append(dialogue)
    if not dialogues:
        found = f"{tally.read} records, all dropped" if tally.read else "no records"
        raise UserError(f"{path}: found {found}; expected at least one ShareGPT dialogue.")
    return dialogues, tally


def _records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (index, parsed JSON value or BadRecord) for each record of the file."""
    text = _read_text(path)
    if text.lstrip().startswith("["):
        yield from enumerate(_parse_array(text, path))
        return
    # Splitting on "\n" alone: str.splitlines also cuts at U+2028, which JSON strings may hold.
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    for index, (number, line) in enumerate(lines):
        record: Any
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            record = BadRecord(
                "not valid JSON",
                f"line {number}, column {error.colno}: not valid JSON: {error.msg} "
                "(a file that does not begin with [ is read as one record a line)",
            )
        except (ValueError, RecursionError) as error:
            record = BadRecord("not valid JSON", f"line {number}: not valid JSON: {error}")
        yield index, record


def _parse_array(text: str, path: Path) -> list[Any]:
    try:
        records: list[Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}. "
            "Expected one array of records; mend the file there."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting
        raise UserError(f"{path}: not valid JSON: {error}. Expected an array of records.") from None
    return records


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read: {reason}. Give a JSON or JSONL file.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line}: byte {error.start} is not UTF-8. Save the file as UTF-8."
        ) from None
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected ShareGPT dialogues, JSON or JSONL.")
    return text


def _identity(record: Any) -> str:
    has_id = isinstance(record, dict) and record.get("id") is not None
    return f" (id {json.dumps(record['id'], ensure_ascii=False)[:80]})" if has_id else ""


def _parse_record(record: Any, index: int, empty_answers: bool) -> tuple[Dialogue, bool]:
    """Return the dialogue and whether a first turn that was not human was skipped."""
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, dict):
        _bad("record is not an object", f"found {_kind(record)}; expected an object")
    turns = record.get("conversations")
    if not isinstance(turns, list):
        found = f"it is {_kind(turns)}" if "conversations" in record else "there is none"
        _bad("no conversations", f'expected a list under "conversations", but {found}')
    if not turns:
        _bad("no turns", '"conversations" is empty; expected a human turn and a gpt turn')
    parsed = [_parse_turn(turn, number, empty_answers) for number, turn in enumerate(turns)]
    system = parsed.pop(0).text if parsed[0].role == "system" else None
    # As FastChat does: dialogues scraped in mid-thread often open with an answer.
    skip = bool(parsed) and parsed[0].role == "assistant"
    parsed = parsed[1:] if skip else parsed
    if not parsed:
        _bad("no turns", "no human turn is left; expected a human turn and a gpt turn")
    for number, turn in enumerate(parsed):
        expected = "human" if number % 2 == 0 else "gpt"
        if turn.role != ROLES[expected]:
            found = next(name for name, role in ROLES.items() if role == turn.role)
            place = number + int(skip) + int(system is not None)
            _bad("turns do not alternate", f'turn {place} is "{found}"; expected "{expected}"')
    identity = str(index if record.get("id") is None else record["id"])
    printable = identity.encode("utf-8", "replace").decode()
    return Dialogue(printable, tuple(parsed), system), skip


def _parse_turn(turn: Any, number: int, empty_answers: bool) -> Turn:
    if not isinstance(turn, dict):
        expected = 'expected an object with "from" and "value"'
        _bad("turn is not an object", f"turn {number} is {_kind(turn)}; {expected}")
    role, value = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or role not in ROLES:
        found = f"the role {json.dumps(role, ensure_ascii=False)}" if "from" in turn else "no role"
        _bad("unknown role", f"turn {number} has {found[:80]}; expected human, gpt or system")
    if not isinstance(value, str):
        found = f'"value" is {_kind(value)}' if "value" in turn else 'there is no "value"'
        _bad("value is not text", f"turn {number}: {found}; expected a string")
    if not value.strip() and not (empty_answers and role == "gpt"):
        _bad("empty value", f'turn {number}: "value" is empty; expected text')
    if LONE_SURROGATE.search(value):
        _bad("lone surrogate", f'turn {number}: "value" holds half a surrogate pair; expected text')
    return Turn(ROLES[role], value)


def _bad(cause: str, explanation: str) -> NoReturn:
    raise BadRecord(cause, explanation)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds[type(value)]
