"""Reads and validates ShareGPT dialogues; an error message names file, record and remedy."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from data.dialogues.conversation import Dialogue, Role, ToolCall, Turn
from data.dialogues.formats import (
    AFTER,
    SHAREGPT,
    as_sharegpt,
    calls_of,
    check_json,
    kind,
    reasoning_of,
    tools_of,
    turn_roles,
)
from data.dialogues.keys import is_meaningful, reserved_names, unused_keys
from data.errors import BadRecord, UserError
from data.files.read import find_files, read_records

IDS_PER_CAUSE = 5  # ids that are kept and printed for each cause


OnBadRecord = Literal["fail", "skip"]


@dataclass
class Tally:
    """Counts of records; read = kept + dropped.

    dropped: by cause. noted: alterations. named: the first ids of each cause.
    answers: supervised answers; ended: those that are trained including EOS.
    sources: dialogues of each source, in order. closers: answers by the token that closes them.
    unused: records by the key that is not used.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    answers: int = 0
    ended: int = 0
    sources: list[int] = field(default_factory=list)
    closers: Counter[str] = field(default_factory=Counter)
    unused: Counter[str] = field(default_factory=Counter)

    def drop(self, cause: str, identity: str) -> None:
        """Count a record as dropped."""
        self.dropped[cause] += 1
        named = self.named.setdefault(cause, [])
        if len(named) < IDS_PER_CAUSE:
            named.append(identity[:40])

    def add(self, other: "Tally") -> None:
        """Add the counts of another tally, except `sources`."""
        self.read, self.kept = self.read + other.read, self.kept + other.kept
        self.answers, self.ended = self.answers + other.answers, self.ended + other.ended
        self.dropped.update(other.dropped)
        self.noted.update(other.noted)
        self.closers.update(other.closers)
        self.unused.update(other.unused)
        for cause, ids in other.named.items():
            self.named[cause] = [*self.named.get(cause, []), *ids][:IDS_PER_CAUSE]

    def __str__(self) -> str:
        causes = ", ".join(map(self._cause, sorted(self.dropped)))
        text = f"read {self.read} = kept {self.kept} + dropped {self.dropped.total()}"
        text += f" ({causes})" if causes else ""
        if self.answers:
            text += f"; {self.ended} of {self.answers} answers trained incl. EOS"
            names = " or ".join(map(repr, sorted(self.closers)))
            text += f" ({names})" if names else ""
        text += "".join(f"; {note}: {n}" for note, n in sorted(self.noted.items()))
        lost = {key: count for key, count in sorted(self.unused.items()) if is_meaningful(key)}
        text += "".join(f'; "{key}" not used: {count}' for key, count in lost.items())
        others = [key for key in sorted(self.unused) if key not in lost]
        return text + (f"; other keys: {', '.join(others)}"[:200] if others else "")

    def _cause(self, cause: str) -> str:
        count, named = self.dropped[cause], self.named.get(cause, [])[:IDS_PER_CAUSE]
        ids = ", ".join(named) + ", …" * (count > len(named))
        return f"{cause}: {count}" + f" [{ids}]" * bool(named)


def read_dialogues(
    paths: Sequence[Path],
    tally: Tally,
    on_bad_record: Literal["fail", "skip"] = "fail",
    empty_answers: bool = False,
    train_on: Literal["all", "last"] = "all",
) -> Iterator[Dialogue]:
    """Yield the dialogues of files and folders one at a time, and count each record.

    empty_answers: whether answers without text are valid.
    train_on: whether all answers are supervised, or only the last of each dialogue.

    Raises UserError for an unreadable file, and if there is no dialogue. Raises it for a bad record
    unless `on_bad_record` is "skip".
    """
    count = 0
    for path in find_files(paths):
        for dialogue in read_file(path, tally, on_bad_record, empty_answers, train_on):
            count += 1
            yield dialogue
    if not count:
        records = f"{tally.read} records, all dropped ({tally})" if tally.read else "no records"
        names = ", ".join(map(str, paths))
        raise UserError(f"{names}: found {records}; expected at least one ShareGPT dialogue.")


def read_file(
    path: Path,
    tally: Tally,
    on_bad_record: Literal["fail", "skip"] = "fail",
    empty_answers: bool = False,
    train_on: Literal["all", "last"] = "all",
) -> Iterator[Dialogue]:
    """Yield the dialogues of one file, like `read_dialogues`; a file without any is valid."""
    records = ((record, f"{path}: record {index}") for index, record in read_records(path))
    return dialogues_of(records, tally, on_bad_record, empty_answers, train_on)


def dialogues_of(
    records: Iterable[tuple[Any, str]],
    tally: Tally,
    on_bad_record: Literal["fail", "skip"] = "fail",
    empty_answers: bool = False,
    train_on: Literal["all", "last"] = "all",
) -> Iterator[Dialogue]:
    """Yield the dialogues of parsed values, and count each value.

    records: pairs of a parsed value and its place ("file: record 7").

    Raises UserError for a bad record unless `on_bad_record` is "skip".
    """
    for record, place in records:
        tally.read += 1
        number = place.rpartition(" ")[2]
        try:
            dialogue, skipped_first = _parse_record(record, place, empty_answers)
        except BadRecord as bad:
            if on_bad_record == "fail":
                raise bad_record_error(f"{place}{_identity(record)}", None, bad) from None
            tally.drop(bad.cause, _id(record, number))
            continue
        tally.noted.update(["first turn not human, skipped"] if skipped_first else [])
        tally.unused.update(unused_keys(record))
        yield _last_only(dialogue) if train_on == "last" else dialogue


def bad_record_error(place: str, identity: str | None, bad: BadRecord) -> UserError:
    """Return the error for a bad record that is not skipped."""
    named = f' (id "{identity}")' if identity is not None else ""
    return UserError(
        f"{place}{named}: {str(bad).rstrip('.')}. "
        "Correct the record, or drop all such records with --on_bad_record skip."
    )


def _last_only(dialogue: Dialogue) -> Dialogue:
    """Return the dialogue with only the last of its supervised answers."""
    turns = enumerate(dialogue.turns)
    answers = [n for n, turn in turns if turn.role == "assistant" and turn.supervised]
    trained = tuple(
        replace(turn, supervised=n == max(answers, default=-1))
        for n, turn in enumerate(dialogue.turns)
    )
    return replace(dialogue, turns=trained)


def _id(record: Any, number: str) -> str:
    given = record.get("id") if isinstance(record, dict) else None
    return str(number if given is None else given).encode("utf-8", "replace").decode()


def _identity(record: Any) -> str:
    has_id = isinstance(record, dict) and record.get("id") is not None
    return (
        f" (id {json.dumps(record['id'], ensure_ascii=False, default=str)[:80]})" if has_id else ""
    )


def _parse_record(record: Any, place: str, empty_answers: bool) -> tuple[Dialogue, bool]:
    """Return the dialogue, and whether a leading assistant turn was skipped."""
    if isinstance(record, BadRecord):
        raise record
    record = as_sharegpt(record)
    roles, turns = turn_roles(record), record["conversations"]
    if not turns:
        _bad("no turns", '"conversations" is empty; expected a human turn and a gpt turn')
    parsed = [
        parse_turn(turn, role, number, empty_answers)
        for number, (turn, role) in enumerate(zip(turns, roles, strict=True))
    ]
    system = parsed.pop(0).text if parsed[0].role == "system" else None
    # FastChat skips it too: dialogues scraped in mid-thread often begin with an answer.
    skip = bool(parsed) and parsed[0].role == "assistant"
    parsed = parsed[1:] if skip else parsed
    if not parsed:
        _bad("no turns", "no human turn is left; expected a human turn and a gpt turn")
    offset = len(turns) - len(parsed)
    if parsed[0].role != "user":
        found = f'turn {offset} is "{SHAREGPT[parsed[0].role]}"'
        _bad("turns do not alternate", f'{found}; expected "human"')
    for number, (before, turn) in enumerate(pairwise(parsed), offset + 1):
        if turn.role not in AFTER[before.role]:
            found = f'turn {number} is "{SHAREGPT[turn.role]}" after "{SHAREGPT[before.role]}"'
            expected = " or ".join(f'"{SHAREGPT[role]}"' for role in AFTER[before.role])
            _bad("turns do not alternate", f"{found}; expected {expected}")
    arguments = arguments_of(record)
    tools = tuple(tools_of(record).get("tools", ()))
    identity = _id(record, place.rpartition(" ")[2])
    return Dialogue(identity, with_tool_names(parsed), system, tools, arguments, place), skip


def arguments_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record's own arguments of the chat template; raises BadRecord."""
    arguments = record.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        found = f'"chat_template_kwargs" is {kind(arguments)}'
        _bad("template arguments are not an object", f"{found}; expected an object")
    check_json(arguments, '"chat_template_kwargs"')
    if reserved := reserved_names(arguments):
        found = f'"chat_template_kwargs" has {", ".join(reserved)}, which the trainer itself gives'
        _bad("reserved template arguments", f"{found}; expected variables of the template's own")
    return arguments


def with_tool_names(turns: list[Turn]) -> tuple[Turn, ...]:
    """Return the turns with the name of its tool on each result, where the calls decide it."""
    named, calls, results = [], list[ToolCall](), 0
    for turn in turns:
        if turn.role == "assistant":
            calls, results = [*turn.calls], 0
        elif turn.role == "tool":
            same = [call for call in calls if turn.call_id is not None and call.id == turn.call_id]
            found = same or (calls[results : results + 1] if turn.call_id is None else [])
            name = turn.name or next((call.name for call in found), None)
            turn, results = replace(turn, name=name), results + 1
        named.append(turn)
    return tuple(named)


def parse_turn(turn: dict[str, Any], role: Role, number: int, empty_answers: bool) -> Turn:
    """Return a turn of a ShareGPT record; raises BadRecord."""
    text, reasoning = turn["value"], reasoning_of(turn, number)
    given = calls_of(turn, number)
    calls = tuple(ToolCall(call["name"], call["arguments"], call.get("id")) for call in given)
    may_be_empty = role == "assistant" and (empty_answers or calls)
    if not text.strip() and not may_be_empty:
        _bad("empty value", f'turn {number}: "value" is empty; expected text')
    if not isinstance(reasoning, str | None):
        found = f'"reasoning" is {kind(reasoning)}'
        _bad("value is not text", f"turn {number}: {found}; expected a string")
    if role != "assistant" and (calls or reasoning):
        _bad("turn of another role", f"turn {number}: found reasoning or calls of {role}")
    more = [turn.get("name"), turn.get("tool_call_id")]
    check_json([reasoning, *more], f"turn {number}")
    name, call_id = (None if one is None else str(one) for one in more)
    return Turn(role, text, _is_supervised(turn, number), reasoning, calls, name, call_id)


def _is_supervised(turn: dict[str, Any], number: int) -> bool:
    """Return whether a turn is supervised, by its keys "train" and "weight"; the default is yes."""
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        found = f'"train" {train!r}' if train not in (None, True, False) else f'"weight" {weight!r}'
        _bad("unknown weight", f"turn {number}: found {found}; expected true or false, 0 or 1")
    return train not in (False, 0) and weight != 0


def _bad(cause: str, explanation: str) -> NoReturn:
    raise BadRecord(cause, explanation)
