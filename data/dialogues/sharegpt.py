"""Reads and validates ShareGPT dialogues; an error message names file, record and remedy."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn

from data.dialogues.formats import AFTER, SHAREGPT, Role, as_sharegpt, turn_roles
from data.errors import BadRecord, UserError
from data.files.read import find_files, read_records

IDS_PER_CAUSE = 5  # ids that are kept and printed for each cause


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue; `supervised` matters only for an assistant turn."""

    role: Role
    text: str
    supervised: bool = True


@dataclass(frozen=True)
class Dialogue:
    """The turns of a dialogue, a user turn first.

    id: the record's id, or its index in the file.
    system: text of a leading system turn; it replaces the template's system text.
    """

    id: str
    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def share(self) -> float:
        """A number in [0, 1) that depends only on the content."""
        system = [] if self.system is None else [["system", self.system]]
        return share_of([*system, *([turn.role, turn.text] for turn in self.turns)])


@dataclass
class Tally:
    """Counts of records; read = kept + dropped.

    dropped: dropped records by cause. noted: changes by kind.
    named: the first ids that were dropped for each cause.
    answers: supervised answers. ended: supervised answers that are trained including EOS.
    sources: number of dialogues of each source, in order.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    noted: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)
    answers: int = 0
    ended: int = 0
    sources: list[int] = field(default_factory=list)

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
        for cause, ids in other.named.items():
            self.named[cause] = [*self.named.get(cause, []), *ids][:IDS_PER_CAUSE]

    def __str__(self) -> str:
        causes = ", ".join(map(self._cause, sorted(self.dropped)))
        text = f"read {self.read} = kept {self.kept} + dropped {self.dropped.total()}"
        text += f" ({causes})" if causes else ""
        if self.answers:
            text += f"; {self.ended} of {self.answers} answers trained incl. EOS"
        return text + "".join(f"; {note}: {n}" for note, n in sorted(self.noted.items()))

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
            dialogue, skipped_first = _parse_record(record, number, empty_answers)
        except BadRecord as bad:
            if on_bad_record == "fail":
                raise UserError(
                    f"{place}{_identity(record)}: {bad}. "
                    "Correct the record, or drop all such records with --on_bad_record skip."
                ) from None
            tally.drop(bad.cause, _id(record, number))
            continue
        tally.noted.update(["first turn not human, skipped"] if skipped_first else [])
        yield _last_only(dialogue) if train_on == "last" else dialogue


def share_of(content: Sequence[Sequence[str]]) -> float:
    """Return a number in [0, 1) that depends on roles and texts; low numbers are held out."""
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _last_only(dialogue: Dialogue) -> Dialogue:
    """Return the dialogue with only its last answer supervised."""
    answers = [n for n, turn in enumerate(dialogue.turns) if turn.role == "assistant"]
    turns = tuple(
        replace(turn, supervised=turn.supervised and n == max(answers, default=-1))
        for n, turn in enumerate(dialogue.turns)
    )
    return replace(dialogue, turns=turns)


def _id(record: Any, number: str) -> str:
    given = record.get("id") if isinstance(record, dict) else None
    return str(number if given is None else given).encode("utf-8", "replace").decode()


def _identity(record: Any) -> str:
    has_id = isinstance(record, dict) and record.get("id") is not None
    return f" (id {json.dumps(record['id'], ensure_ascii=False)[:80]})" if has_id else ""


def _parse_record(record: Any, number: str, empty_answers: bool) -> tuple[Dialogue, bool]:
    """Return the dialogue, and whether a leading assistant turn was skipped."""
    if isinstance(record, BadRecord):
        raise record
    record = as_sharegpt(record)
    roles, turns = turn_roles(record), record["conversations"]
    if not turns:
        _bad("no turns", '"conversations" is empty; expected a human turn and a gpt turn')
    parsed = [
        _turn(turn, role, place, empty_answers)
        for place, (turn, role) in enumerate(zip(turns, roles, strict=True))
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
    for place, (before, turn) in enumerate(pairwise(parsed), offset + 1):
        if turn.role not in AFTER[before.role]:
            found = f'turn {place} is "{SHAREGPT[turn.role]}" after "{SHAREGPT[before.role]}"'
            expected = " or ".join(f'"{SHAREGPT[role]}"' for role in AFTER[before.role])
            _bad("turns do not alternate", f"{found}; expected {expected}")
    return Dialogue(_id(record, number), tuple(parsed), system), skip


def _turn(turn: dict[str, Any], role: Role, number: int, empty_answers: bool) -> Turn:
    text = turn["value"]
    if not text.strip() and not (empty_answers and role == "assistant"):
        _bad("empty value", f'turn {number}: "value" is empty; expected text')
    return Turn(role, text, _is_supervised(turn, number))


def _is_supervised(turn: dict[str, Any], number: int) -> bool:
    """Return whether a turn is supervised, by its keys "train" and "weight"; the default is yes."""
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        found = f'"train" {train!r}' if train not in (None, True, False) else f'"weight" {weight!r}'
        _bad("unknown weight", f"turn {number}: found {found}; expected true or false, 0 or 1")
    return train not in (False, 0) and weight != 0


def _bad(cause: str, explanation: str) -> NoReturn:
    raise BadRecord(cause, explanation)
