"""`python -m data clean`: cleans raw ShareGPT dialogues; counts changed and dropped dialogues.

Cleaning is idempotent: the rules for messages are repeated until nothing changes.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

from data.dialogues.formats import (
    Turns,
    alternate,
    as_sharegpt,
    calls_of,
    from_first_user,
    reasoning_of,
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

# In order. The first five rules change messages, the next two shorten dialogues, the others drop
# dialogues.
RULES = {
    "invisible": "remove invisible characters; replace unusual spaces and line ends",
    "html": "convert HTML to Markdown",
    "residue": 'remove leftovers of web pages: "Copy code", "1 / 2", "12 chars / 2 words"',
    "fences": "remove empty code fences",
    "newlines": "reduce three or more line breaks to two, and strip messages",
    "empty": "end a dialogue before its first empty message",
    "trim": "start a dialogue at its first user message, and end it at its last answer",
    "plugins": "drop dialogues with plug-ins",
    "alternation": "drop dialogues in which user and assistant do not alternate",
    "short": "drop dialogues of fewer than 16 characters",
    "blocked": "drop dialogues with one of --blocked_words in an answer",
    "ids": "drop a dialogue with the id of an earlier one",
    "content": "drop a dialogue with the same messages as an earlier one",
    "near": "drop a near duplicate of an earlier dialogue (--near_threshold)",
}
STEPS: dict[str, Callable[[str], str]] = {
    "invisible": text_rules.without_unseen,
    "html": html.html_to_markdown,
    "residue": text_rules.without_residue,
    "fences": text_rules.without_empty_fences,
    "newlines": text_rules.without_blank_runs,
}
MAX_PASSES = 20
MIN_CHARACTERS = 16
BLOCKED_WORDS = Path(__file__).parent / "blocked_words.txt"


@dataclass(frozen=True)
class Settings:
    """The settings on which the result of a dialogue depends."""

    rules: tuple[str, ...]
    blocked_words: tuple[str, ...] = ()
    keep_languages: tuple[str, ...] = ()
    skip_languages: tuple[str, ...] = ()
    personal: str = "off"


NO_EXCHANGE = "no question and answer"


class _Unsettled(Exception):
    """A message that cannot be parsed, or that still changes after MAX_PASSES passes."""


def main(argv: list[str]) -> None:
    """Clean the files and print the counts; raises UserError."""
    given = flags().parse_args(argv)
    settings = _settings(given)
    if not 0 < given.near_threshold <= 1:
        raise UserError(
            f"--near_threshold {given.near_threshold}: expected a number above 0 and up to 1."
        )
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
    """Return the cleaned record, or the cause for which it is dropped; raises BadRecord."""
    empty = isinstance(record, dict) and record.get("conversations") == []
    record = record if empty else as_sharegpt(record)
    number = place.rpartition(" ")[2]
    identity = number if record.get("id") is None else str(record["id"])
    # Half a surrogate pair cannot be printed.
    identity = identity.encode("utf-8", "replace").decode()
    if empty:
        return Result(identity, dropped=(NO_EXCHANGE,))
    turn_roles(record, surrogates=True)  # the rule `invisible` removes surrogates
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
    digests: list[tuple[str, bytes]] = []
    if "ids" in settings.rules and record.get("id") not in (None, ""):
        digests.append(("duplicate id", digest(["id", identity])))
    if "content" in settings.rules:
        content = [part for turn in turns for part in (speaker(turn), turn["value"])]
        parts = (map(of, turns, count()) for of in (reasoning_of, calls_of))
        more = [record.get("tools"), *chain(*parts)]
        content += [json.dumps(more)] if any(more) else []
        digests.append(("duplicate content", digest(content)))
    return Result(
        identity,
        ({**record, "conversations": turns},),
        noted=tuple(sorted(noted)),
        exact=tuple(digests),
        near=signature("\n".join(turn["value"] for turn in turns))
        if "near" in settings.rules
        else b"",
    )


def _cleaned(turns: Turns, settings: Settings) -> tuple[Turns, set[str]]:
    """Apply the rules that change turns; return the turns and the rules that changed them."""
    noted: set[str] = set()
    if "trim" in settings.rules:
        before, turns = len(turns), from_first_user(turns)
        noted |= {"trim"} if len(turns) < before else set()
    cleaned: Turns = []
    for turn in turns:
        # The text of a tool is no prose: markup and blanks are part of its result.
        how = replace(settings, rules=()) if speaker(turn) == "tool" else settings
        text, changed = _settled(turn["value"], how)
        noted |= changed
        cleaned.append(turn if text == turn["value"] else {**turn, "value": text})
    if "empty" in settings.rules:
        before, cleaned = len(cleaned), until_empty(cleaned)
        noted |= {"empty"} if len(cleaned) < before else set()
    if "trim" in settings.rules:
        before, cleaned = len(cleaned), to_last_answer(cleaned)
        noted |= {"trim"} if len(cleaned) < before else set()
    return cleaned, noted


def _settled(text: str, settings: Settings) -> tuple[str, set[str]]:
    """Apply the rules for messages until none changes the text; raises _Unsettled."""
    noted: set[str] = set()
    for _ in range(MAX_PASSES):
        before = text
        for rule, step in STEPS.items():
            if rule in settings.rules:
                try:
                    after = step(text)
                except (RecursionError, AssertionError, ValueError) as error:  # from the parsers
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
    """Return the cause for which the dialogue is dropped, or None."""
    rules = settings.rules
    if not {"user", "assistant"} <= {speaker(turn) for turn in turns}:
        return NO_EXCHANGE
    if "alternation" in rules and not alternate(turns):
        return "wrong alternation"
    texts = [turn["value"] for turn in turns]
    if "short" in rules and sum(map(len, texts)) < MIN_CHARACTERS:
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
    command = parser("clean", "Clean raw ShareGPT dialogues and remove duplicates.")
    own = command.add_argument_group("clean")
    width = max(map(len, RULES))
    command.epilog = "rules:\n" + "\n".join(f"  {n:{width}}  {what}" for n, what in RULES.items())
    command.epilog += "\nA dialogue without a question or without an answer is always dropped."
    own.add_argument("--skip", nargs="+", default=[], metavar="RULE", help="rules to leave out")
    own.add_argument(
        "--blocked_words",
        type=Path,
        default=BLOCKED_WORDS,
        metavar="FILE",
        help="one phrase per line (default: data/preparation/blocked_words.txt)",
    )
    own.add_argument(
        "--keep_languages",
        nargs="+",
        default=[],
        metavar="CODE",
        help="en de ...: drop other languages",
    )
    own.add_argument(
        "--skip_languages",
        nargs="+",
        default=[],
        metavar="CODE",
        help="zh ...: drop these languages",
    )
    own.add_argument(
        "--personal",
        choices=("report", "mask", "off"),
        default="off",
        help="count or mask e-mail addresses, phone numbers, keys and cards",
    )
    own.add_argument(
        "--near_threshold", type=float, default=0.9, metavar="SHARE",
        help="minimum share of common 5-grams that makes a dialogue a near duplicate",
    )  # fmt: skip
    return command


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
