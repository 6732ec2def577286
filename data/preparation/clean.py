"""`python -m data clean`: from raw ShareGPT dialogues to clean ones, each change and loss counted.

Cleaning what is clean changes nothing: each message is cleaned until nothing changes any more.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.dialogues.formats import (
    Turns,
    alternate,
    as_sharegpt,
    from_first_user,
    speaker,
    to_last_answer,
    turn_roles,
    until_empty,
)
from data.errors import UserError
from data.preparation import html, text_rules
from data.preparation.duplicates import digest
from data.preparation.job import Job, Result, parser, run, summary
from data.preparation.languages import UNKNOWN, check_languages, language_of
from data.preparation.near_duplicates import signature
from data.preparation.text_rules import masked

# In their order. The first five change messages, the next two dialogues, the others drop some.
RULES = {
    "invisible": "invisible characters are removed, unusual spaces and line ends made usual",
    "html": "HTML becomes Markdown",
    "residue": 'leftovers of web pages are removed: "Copy code", "1 / 2", "12 chars / 2 words"',
    "fences": "empty code fences are removed",
    "newlines": "three line breaks and more become two, messages are stripped",
    "empty": "a dialogue ends before its first empty message",
    "trim": "a dialogue goes from the first user's to the last assistant's message",
    "plugins": "dialogues with plug-ins are dropped",
    "alternation": "dialogues are dropped where user and assistant do not take turns",
    "short": "dialogues of fewer than 16 characters are dropped",
    "blocked": "dialogues are dropped where an answer has one of --blocked_words",
    "ids": "a dialogue with the id of an earlier one is dropped",
    "content": "a dialogue with all the messages of an earlier one is dropped",
    "near": "a dialogue that is nearly as an earlier one is dropped (--near_threshold)",
}
STEPS: dict[str, Callable[[str], str]] = {
    "invisible": text_rules.without_unseen,
    "html": html.html_to_markdown,
    "residue": text_rules.without_residue,
    "fences": text_rules.without_empty_fences,
    "newlines": text_rules.without_blank_runs,
}
PASSES = 20
FEWEST = 16  # characters
BLOCKED_WORDS = Path(__file__).parent / "blocked_words.txt"


@dataclass(frozen=True)
class Settings:
    """All that decides what becomes of a dialogue."""

    rules: tuple[str, ...]
    blocked_words: tuple[str, ...] = ()
    keep_languages: tuple[str, ...] = ()
    skip_languages: tuple[str, ...] = ()
    personal: str = "off"


NO_EXCHANGE = "no question and answer"


class _Unsettled(Exception):
    """A message that each pass changes anew, or that cannot be parsed."""


def main(argv: list[str]) -> None:
    """Clean the files and print the account."""
    given = flags().parse_args(argv)
    settings = _settings(given)
    if not 0 < given.near_threshold <= 1:
        raise UserError(f"--near_threshold {given.near_threshold}: expected a share up to 1.")
    job = Job(
        "clean",
        given.inputs,
        given.out,
        given.report,
        asdict(settings) | {"near_threshold": given.near_threshold},
        partial(clean, settings),
        given.on_bad_record == "skip",
        given.processes,
        given.near_threshold,
    )
    print(summary(run(job)), file=sys.stderr)


def clean(settings: Settings, record: Any, place: str) -> Result:
    """Return the record cleaned, or why it is dropped; raises BadRecord."""
    empty = isinstance(record, dict) and record.get("conversations") == []
    record = record if empty else as_sharegpt(record)
    number = place.rpartition(" ")[2]
    identity = number if record.get("id") is None else str(record["id"])
    identity = identity.encode("utf-8", "replace").decode()  # half a surrogate pair is not printed
    if empty:
        return Result(identity, dropped=(NO_EXCHANGE,))
    turn_roles(record, surrogates=True)  # the rule for invisible characters takes them out
    turns: Turns = record["conversations"]
    if "plugins" in settings.rules and record.get("plugins"):
        return Result(identity, dropped=("plug-ins",))
    try:
        turns, noted = _cleaned(turns, settings)
    except _Unsettled:
        return Result(identity, dropped=("cannot be cleaned",))
    if cause := _rejected(turns, settings):
        return Result(identity, dropped=(cause,))
    if settings.personal == "report":
        found = [masked(turn["value"])[1] for turn in turns]
        noted |= {f"has {kind}" for kind in set().union(*found)}
    known: list[tuple[str, bytes]] = []
    if "ids" in settings.rules and record.get("id") not in (None, ""):
        known.append(("duplicate id", digest(["id", identity])))
    if "content" in settings.rules:
        spoken = [part for turn in turns for part in (speaker(turn), turn["value"])]
        known.append(("duplicate content", digest(spoken)))
    return Result(
        identity,
        ({**record, "conversations": turns},),
        noted=tuple(sorted(noted)),
        exact=tuple(known),
        near=signature("\n".join(turn["value"] for turn in turns))
        if "near" in settings.rules
        else b"",
    )


def _cleaned(turns: Turns, settings: Settings) -> tuple[Turns, set[str]]:
    """Return the turns after the rules that change them, and which of these did."""
    noted: set[str] = set()
    if "trim" in settings.rules:
        before, turns = len(turns), from_first_user(turns)
        noted |= {"trim"} if len(turns) < before else set()
    made: Turns = []
    for turn in turns:
        text, changed = _settled(turn["value"], settings)
        noted |= changed
        made.append(turn if text == turn["value"] else {**turn, "value": text})
    if "empty" in settings.rules:
        before, made = len(made), until_empty(made)
        noted |= {"empty"} if len(made) < before else set()
    if "trim" in settings.rules:
        before, made = len(made), to_last_answer(made)
        noted |= {"trim"} if len(made) < before else set()
    return made, noted


def _settled(text: str, settings: Settings) -> tuple[str, set[str]]:
    """Apply the rules for messages until none changes anything."""
    noted: set[str] = set()
    for _ in range(PASSES):
        before = text
        for rule, step in STEPS.items():
            if rule in settings.rules:
                try:
                    after = step(text)
                except (RecursionError, AssertionError, ValueError) as error:  # of parsers
                    raise _Unsettled from error
                if after != text:
                    noted.add(rule)
                    text = after
        if settings.personal == "mask":
            text, found = masked(text)
            noted |= {f"masked {kind}" for kind in found}
        if text == before:
            return text, noted
    raise _Unsettled


def _rejected(turns: Turns, settings: Settings) -> str | None:
    """Return why the dialogue is dropped, if it is."""
    rules = settings.rules
    if not {"user", "assistant"} <= {speaker(turn) for turn in turns}:
        return NO_EXCHANGE
    if "alternation" in rules and not alternate(turns):
        return "wrong alternation"
    texts = [turn["value"] for turn in turns]
    if "short" in rules and sum(map(len, texts)) < FEWEST:
        return "too short"
    if "blocked" in rules:
        answers = (turn["value"] for turn in turns if speaker(turn) == "assistant")
        lowered = "\n".join(answers).lower().replace("\u2019", "'")
        if any(word in lowered for word in settings.blocked_words):
            return "blocked words"
    if settings.keep_languages or settings.skip_languages:
        language = language_of(texts)
        unwanted = settings.keep_languages and language not in settings.keep_languages
        if language in settings.skip_languages or (unwanted and language not in UNKNOWN):
            return f"language {language}"
    return None


def flags() -> argparse.ArgumentParser:
    """Return the command's parser."""
    made = parser("clean", "From raw ShareGPT dialogues to clean ones.")
    own = made.add_argument_group("clean")
    width = max(map(len, RULES))
    made.epilog = "rules:\n" + "\n".join(f"  {n:{width}}  {what}" for n, what in RULES.items())
    made.epilog += "\nA dialogue without a question or without an answer is always dropped."
    own.add_argument("--skip", nargs="+", default=[], metavar="RULE", help="leave out rules")
    own.add_argument(
        "--blocked_words",
        type=Path,
        default=BLOCKED_WORDS,
        metavar="FILE",
        help="a phrase a line (default: data/preparation/blocked_words.txt)",
    )
    own.add_argument(
        "--keep_languages", nargs="+", default=[], metavar="CODE", help="en de ...: drop all others"
    )
    own.add_argument(
        "--skip_languages", nargs="+", default=[], metavar="CODE", help="zh ...: drop these"
    )
    own.add_argument(
        "--personal",
        choices=("report", "mask", "off"),
        default="off",
        help="count, or mask, e-mail addresses, phone numbers, keys and cards",
    )
    own.add_argument(
        "--near_threshold", type=float, default=0.9, metavar="SHARE",
        help="of 5-grams that are alike, from which on a dialogue is a near duplicate",
    )  # fmt: skip
    return made


def _settings(given: argparse.Namespace) -> Settings:
    for name in given.skip:
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, 1, 0)[0]
            known = ", ".join(RULES)
            raise UserError(f"--skip {name}: no such rule; did you mean {near}? Rules: {known}.")
    check_languages([*given.keep_languages, *given.skip_languages])
    try:
        lines = given.blocked_words.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--blocked_words {given.blocked_words}: cannot be read: {error}") from None
    words = (line.strip().lower().replace("\u2019", "'") for line in lines)
    return Settings(
        tuple(rule for rule in RULES if rule not in given.skip),
        tuple(word for word in words if word),
        tuple(given.keep_languages),
        tuple(given.skip_languages),
        given.personal,
    )
