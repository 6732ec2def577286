"""Reads and validates ShareGPT dialogues; every error names file, record and remedy."""

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

NAMED = 5  # ids that are told of each cause


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue; of the assistant's only those `supervised` are learnt."""

    role: Role
    text: str
    supervised: bool = True


@dataclass(frozen=True)
class Dialogue:
    """Turns, the user's first; `id` is the record's own or its index in the file.

    `system` is the text of a leading system turn, which replaces the template's own.
    """

    id: str
    turns: tuple[Turn, ...]
    system: str | None = None

    @property
    def share(self) -> float:
        """A number from 0 up to 1 that its content decides, and nothing else."""
        system = [] if self.system is None else [["system", self.system]]
        return share_of([*system, *([turn.role, turn.text] for turn in self.turns)])


@dataclass
class Tally:
    """Where every record went: read = kept + dropped; `noted` counts what was altered.

    Each of the three is counted where it happens. `named` are the first ids of each cause. Of
    `answers` that are to be learnt, `ended` are learnt to their end. `sources`: how many dialogues
    each of them gave, in their order.
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
        if len(named) < NAMED:
            named.append(identity[:40])

    def add(self, other: "Tally") -> None:
        """Count what another has counted, too; sources are not added."""
        self.read, self.kept = self.read + other.read, self.kept + other.kept
        self.answers, self.ended = self.answers + other.answers, self.ended + other.ended
        self.dropped.update(other.dropped)
        self.noted.update(other.noted)
        for cause, ids in other.named.items():
            self.named[cause] = [*self.named.get(cause, []), *ids][:NAMED]

    def __str__(self) -> str:
        causes = ", ".join(map(self._cause, sorted(self.dropped)))
        text = f"read {self.read} = kept {self.kept} + dropped {self.dropped.total()}"
        text += f" ({causes})" if causes else ""
        if self.answers:
            text += f"; {self.ended} of {self.answers} answers learnt to their end"
        return text + "".join(f"; {note}: {n}" for note, n in sorted(self.noted.items()))

    def _cause(self, cause: str) -> str:
        count, named = self.dropped[cause], self.named.get(cause, [])[:NAMED]
        ids = ", ".join(named) + ", …" * (count > len(named))
        return f"{cause}: {count}" + f" [{ids}]" * bool(named)


def read_dialogues(
    paths: Sequence[Path],
    tally: Tally,
    on_bad_record: Literal["fail", "skip"] = "fail",
    empty_answers: bool = False,
    train_on: Literal["all", "last"] = "all",
) -> Iterator[Dialogue]:
    """Yield the dialogues of files and folders one at a time, and count every record.

    Raises UserError for a file that cannot be read and, unless `on_bad_record` is "skip", for a bad
    record; also where nothing was kept. `empty_answers` are kept only where asked for.
    """
    found = 0
    for path in find_files(paths):
        for dialogue in read_file(path, tally, on_bad_record, empty_answers, train_on):
            found += 1
            yield dialogue
    if not found:
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
    """Yield the dialogues of one file, of which there may be none; else as `read_dialogues`."""
    placed = ((record, f"{path}: record {index}") for index, record in read_records(path))
    return dialogues_of(placed, tally, on_bad_record, empty_answers, train_on)


def dialogues_of(
    records: Iterable[tuple[Any, str]],
    tally: Tally,
    on_bad_record: Literal["fail", "skip"] = "fail",
    empty_answers: bool = False,
    train_on: Literal["all", "last"] = "all",
) -> Iterator[Dialogue]:
    """Yield the dialogues of parsed values, each with its place ("file: record 7"); count all.

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
    """Return the number from 0 up to 1 that roles and texts decide; by it a part is held out."""
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _last_only(dialogue: Dialogue) -> Dialogue:
    """Return the dialogue with its last answer supervised and no other."""
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
    """Return the dialogue and whether a first turn that was not human was skipped."""
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
    # As FastChat does: dialogues scraped in mid-thread often open with an answer.
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
    """Whether a turn is to be learnt, as its "train" or "weight" says, if it has one."""
    train, weight = turn.get("train"), turn.get("weight")
    if train not in (None, True, False) or weight not in (None, 0, 1):
        found = f'"train" {train!r}' if train not in (None, True, False) else f'"weight" {weight!r}'
        _bad("unknown weight", f"turn {number}: found {found}; expected true or false, 0 or 1")
    return train not in (False, 0) and weight != 0


def _bad(cause: str, explanation: str) -> NoReturn:
    raise BadRecord(cause, explanation)
