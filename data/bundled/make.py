"""`python -m data.bundled.make` writes the 500 dialogues that teach the name Vireo."""

import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

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


def main() -> int:
    """Write the file; with --check, only return 1 if the file on disk differs."""
    lines = [json.dumps(dialogue, ensure_ascii=False) for dialogue in make_dialogues()]
    content = ("[\n" + ",\n".join(lines) + "\n]\n").encode()
    if sys.argv[1:] == ["--check"]:
        return 0 if TARGET.is_file() and TARGET.read_bytes() == content else 1
    draft = TARGET.with_suffix(f".{os.getpid()}.tmp")
    draft.write_bytes(content)
    os.replace(draft, TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
