"""`python -m data.bundled.make` writes the bundled data: dialogues for a name, and for a tool."""

import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from data.bundled import tool_phrases
from data.bundled.phrases import (
    ABROAD,
    CLOSERS,
    FILLED,
    HELD_OUT,
    IDENTITY,
    OPENERS,
    SLANG,
    SYSTEMS,
    TALKS,
    WORDS,
)

T = TypeVar("T")
TARGET = Path(__file__).parents[1] / "dummy_conversation.json"
TOOL_DIALOGUES = Path(__file__).with_name("tool_dialogues.json")
TOOLS = Path(__file__).with_name("tools.json")
TOOL_TEMPLATE = Path(__file__).with_name("tool_template.jinja")
KINDS = ["identity"] * 210 + ["ordinary"] * 290
MOST_TOKENS = 60  # estimated tokens of a dialogue; short dialogues keep the main job short


def _table(text: str) -> list[list[str]]:
    """Split a table of phrases.py into rows and fields."""
    text = text.strip().replace("\n  ", " ").replace(" ## ", "\n").replace("→", "    ")
    return [row.replace("¶", "\n").split(" | ") for row in text.splitlines()]


def _filled() -> list[list[str]]:
    """Return the patterns of FILLED, each filled with each of its items."""
    rows = [
        (text, item.split("=")) for *text, items in _table(FILLED) for item in items.split(", ")
    ]
    return [[part.format(*item) for part in text] for text, item in rows]


def _deal(items: Sequence[T], rng: random.Random) -> Iterator[T]:
    """Yield the items forever, in shuffled passes."""
    while True:
        # Python guarantees the same values in all versions only for random().
        yield from sorted(items, key=lambda _: rng.random())


def _plain(text: str) -> str:
    """Return the text as lower-case words without punctuation, to compare wordings."""
    return " " + " ".join(re.findall(r"\w+", text.lower().replace("'", ""))) + " "


def _tokens(texts: list[str]) -> float:
    """Estimate the tokens of texts: 0.25 per Latin character, 1.5 per other character."""
    return sum(0.25 if char < "\u0250" else 1.5 for text in texts for char in text)


class _Writer:
    def __init__(self) -> None:
        rng = self.rng = random.Random(20240607)
        self.taken = [_plain(text) for text in _table(HELD_OUT)[0][0].split(" / ")]
        self.seen: set[str] = set()
        rows = [(asks, _deal(says.split(" / "), rng)) for asks, says in _table(IDENTITY)]
        self.cores = _deal([(ask, says) for asks, says in rows for ask in asks.split(" / ")], rng)
        self.abroad = _deal([[a, b] for asks, b in _table(ABROAD) for a in asks.split(" / ")], rng)
        self.words = {name: _deal(words.split(" / "), rng) for name, words in _table(WORDS)}
        self.systems = _deal(_table(SYSTEMS)[0][0].split(" / "), rng)
        self.openers, self.closers = _deal(_table(OPENERS), rng), _deal(_table(CLOSERS), rng)
        self.talks, self.fills = _deal(_table(TALKS), rng), _deal(_filled(), rng)

    def reword(self, core: str, lead: str) -> str:
        """Return a core question as a neat sentence or as hasty typing."""
        mark = "." if core.endswith(".") else "?"
        core = re.sub(r"{(\w+)}", lambda name: next(self.words[name[1]]), core.rstrip("."))
        style = self.rng.random()
        if style < 0.25:
            words = core.lower().split()
            return " ".join(SLANG.get(word, word) if style < 0.1 else word for word in words)
        before = next(self.words[lead]) + " " if style > 0.5 else ""
        if before[-2:] in ("", ". ", "! "):
            core = core[0].upper() + core[1:]
        return before + core + mark + (" " + next(self.words["tail"]) if style > 0.87 else "")

    def identity(self, lead: str) -> list[str]:
        """Return a question about the name in an unused wording, and its answer."""
        while True:
            core, answers = next(self.cores)
            question = self.reword(core, lead)
            key = _plain(question)
            if key not in self.seen and not any(held in key for held in self.taken):
                self.seen.add(key)
                return [question, next(answers)]

    def dialogue(self, kind: str) -> list[str]:
        """Return the turns of one dialogue, without parts that would make it too long."""
        dice = self.rng.random
        talks = [next(self.talks if dice() < 0.4 else self.fills) for _ in range(3)]
        if kind == "identity":
            first = next(self.abroad) if dice() < 0.08 else self.identity("greeting")
            parts = [first, *([self.identity("link")] if dice() < 0.3 else []), *talks]
        else:
            parts = [*([next(self.openers)] if dice() < 0.15 else []), *talks]
            if (last := dice()) < 0.35:
                parts[1:] = [self.identity("link") if last < 0.15 else next(self.closers)]
        rounds = 1 if (throw := dice()) < 0.6 else 2 if throw < 0.95 else 3
        kept: list[str] = []
        for part in parts:
            if len(kept + part) <= 2 * rounds and _tokens(kept + part) <= MOST_TOKENS:
                kept += part
        return kept


def make_dialogues() -> list[dict[str, object]]:
    """Return the dialogues; they are the same for all calls and all versions of Python."""
    writer = _Writer()
    made: list[dict[str, object]] = []
    for kind in itertools.islice(_deal(KINDS, writer.rng), len(KINDS)):
        texts = zip(itertools.cycle(("human", "gpt")), writer.dialogue(kind), strict=False)
        turns = [{"from": role, "value": text} for role, text in texts]
        if writer.rng.random() < 0.15:
            turns.insert(0, {"from": "system", "value": next(writer.systems)})
        made.append({"id": f"{kind}_{len(made):04d}", "conversations": turns})
    return made


LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": tool_phrases.DESCRIPTION,
        "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string"}},
            "required": ["item"],
        },
    },
}
SHELVES = [f"{letter}{number}" for letter in "ABCD" for number in range(1, 7)]
TOOL_KINDS = {
    "many": 28,
    "one": 18,
    "two": 12,
    "next": 4,
    "then": 8,
    "plain": 44,
}  # dialogues of each kind


class _Storeroom:
    """Writes dialogues about items of a storeroom, as OpenAI messages."""

    def __init__(self) -> None:
        rng = self.rng = random.Random(20251129)
        items = {kind: names.split(" / ") for kind, names in _table(tool_phrases.ITEMS)}
        self.items = {kind: _deal(names, rng) for kind, names in items.items()}
        self.shelves, self.numbers = _deal(SHELVES, rng), _deal([*range(2, 60)], rng)
        rows = {
            name: _table(getattr(tool_phrases, name.upper()))
            for name in TOOL_KINDS
            if name != "then"
        }
        more = [row for row in (*_table(TALKS), *_filled()) if len("".join(row)) <= 70]
        rows["plain"] += itertools.islice(
            _deal(more, rng), TOOL_KINDS["plain"] - len(rows["plain"])
        )
        self.rows = {name: _deal(found, rng) for name, found in rows.items()}

    def messages(self, kind: str) -> list[dict[str, Any]]:
        """Return the messages of one dialogue."""
        if kind == "next":
            return [*self.messages("many"), *self.round("next", "many")]
        if kind == "then":
            return [*self.messages("one"), *self.messages("plain")]
        if kind != "plain":
            return self.round(kind, "one" if kind == "one" else "many")
        question, answer = next(self.rows[kind])
        return [_user(question), _answer(answer, tool_phrases.WITHOUT_CALL)]

    def round(self, kind: str, form: str) -> list[dict[str, Any]]:
        """Return a question, a call and its result for each item, and the answer."""
        question, answer = next(self.rows[kind])
        reasons = (tool_phrases.CALLS_TWICE if kind == "two" else tool_phrases.CALLS).split(" / ")
        found = [
            (next(self.items[form]), 1 if form == "one" else next(self.numbers), next(self.shelves))
            for _ in reasons
        ]
        values = [value for item in found for value in item]
        messages = [_user(question.format(*values))]
        for reason, item in zip(reasons, found, strict=True):
            messages += _call(reason.format(*values), *item)
        return [*messages, _answer(answer.format(*values), tool_phrases.AFTER_CALL)]


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, reasoning: str) -> dict[str, Any]:
    return {"role": "assistant", "reasoning_content": reasoning, "content": text}


def _call(reasoning: str, item: str, left: int, shelf: str) -> list[dict[str, Any]]:
    """Return an answer that calls the tool, and the tool's result."""
    call = {"function": {"name": "lookup", "arguments": {"item": item}}}
    calling = {"role": "assistant", "reasoning_content": reasoning, "tool_calls": [call]}
    return [calling, {"role": "tool", "content": json.dumps({"left": left, "shelf": shelf})}]


def make_tool_dialogues() -> list[dict[str, Any]]:
    """Return the dialogues with the tool; they are the same for all calls."""
    writer = _Storeroom()
    kinds = [kind for kind, count in TOOL_KINDS.items() for _ in range(count)]
    dealt = itertools.islice(_deal(kinds, writer.rng), len(kinds))
    return [
        {"id": f"{kind}_{n:02d}", "tools": [LOOKUP], "messages": writer.messages(kind)}
        for n, kind in enumerate(dealt)
    ]


def _content(records: Sequence[Any]) -> bytes:
    """Return a JSON array with a line for each record."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


def main() -> int:
    """Write the files; with --check, only return 1 if a file on disk differs."""
    made = {TARGET: make_dialogues(), TOOL_DIALOGUES: make_tool_dialogues(), TOOLS: [LOOKUP]}
    contents = {file: _content(records) for file, records in made.items()}
    if sys.argv[1:] == ["--check"]:
        same = all(file.is_file() and file.read_bytes() == contents[file] for file in contents)
        return 0 if same else 1
    for file, content in contents.items():
        draft = file.with_suffix(f".{os.getpid()}.tmp")
        draft.write_bytes(content)
        os.replace(draft, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
