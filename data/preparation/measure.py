"""Counts the rounds, tokens and languages of a chunk of dialogues."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import Tally, dialogues_of
from data.encoding.encode import IGNORE_INDEX, Example, encode_dialogues
from data.encoding.seq2seq import LONGEST, NO_LIMIT, encode_pairs
from data.encoding.templates import DEFAULT, RenderSettings, TemplateName
from data.encoding.tokenizer import load_tokenizer
from data.preparation.duplicates import digest
from data.preparation.languages import language_of
from data.preparation.near_duplicates import signature
from data.preparation.parallel import Chunk

IDS_PER_CAUSE = 1000  # ids that are kept for each cause


@dataclass(frozen=True)
class Settings:
    """The settings on which the counts depend; without a tokenizer, lengths are in characters.

    limits: candidates for --model_max_length.
    """

    tokenizer: str | None
    template: TemplateName
    chat_template: str | None
    on_bad_record: Literal["fail", "skip"]
    limits: tuple[int, ...]
    rendering: RenderSettings = DEFAULT


@dataclass
class Cut:
    """What truncation to a limit of tokens loses."""

    examples: int = 0  # examples longer than the limit
    tokens: int = 0  # tokens beyond the limit
    supervised: int = 0  # supervised tokens beyond the limit
    nothing_left: int = 0  # examples without a supervised token within the limit


@dataclass
class Counts:
    """Counts of dialogues; seen: digests and signature of each dialogue, to find duplicates."""

    tally: Tally = field(default_factory=Tally)
    dialogues: int = 0
    rounds: int = 0
    answers: int = 0
    examples: int = 0
    length: int = 0  # of all examples, in tokens or characters
    supervised: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    cuts: dict[int, Cut] = field(default_factory=dict)
    seen: list[tuple[tuple[tuple[str, bytes], ...], bytes]] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        """Add the counts of another chunk, except `seen`."""
        mine, more = self.tally, other.tally
        for name in ("read", "kept", "answers", "ended"):
            setattr(mine, name, getattr(mine, name) + getattr(more, name))
        mine.dropped += more.dropped
        mine.noted += more.noted
        for cause, ids in more.named.items():
            named = mine.named.setdefault(cause, [])
            named += ids[: IDS_PER_CAUSE - len(named)]
        for name in ("dialogues", "rounds", "answers", "examples", "length", "supervised"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths += other.lengths
        self.languages += other.languages
        for limit, cut in other.cuts.items():
            known = self.cuts.setdefault(limit, Cut())
            for name, count in vars(cut).items():
                setattr(known, name, getattr(known, name) + count)


def measure(settings: Settings, chunk: Chunk) -> Counts:
    """Return the counts of a chunk, which is read and encoded like in training.

    Raises UserError.
    """
    counts = Counts(cuts={limit: Cut() for limit in settings.limits})
    pairs = settings.template == "t5"
    dialogues = _counted(
        dialogues_of(chunk, counts.tally, settings.on_bad_record, empty_answers=pairs), counts
    )
    if settings.tokenizer is None:
        for dialogue in dialogues:
            _count_characters(dialogue, counts)
        return counts
    tokenizer = load_tokenizer(settings.tokenizer, settings.template, settings.chat_template)
    if pairs:
        examples = encode_pairs(dialogues, tokenizer, NO_LIMIT, False, counts.tally)
    else:
        examples = encode_dialogues(
            dialogues, settings.template, tokenizer, LONGEST, counts.tally, settings.rendering
        )
    for example in examples:
        _count_tokens(example, counts)
    return counts


def _counted(dialogues: Iterator[Dialogue], counts: Counts) -> Iterator[Dialogue]:
    """Yield the dialogues, and update the counts that need no tokenizer."""
    for dialogue in dialogues:
        roles = Counter(turn.role for turn in dialogue.turns)
        texts = [turn.text for turn in dialogue.turns]
        counts.dialogues += 1
        counts.rounds += roles["user"]
        counts.answers += roles["assistant"]
        counts.languages[language_of(texts)] += 1
        content = [part for turn in dialogue.turns for part in (turn.role, turn.text)]
        digests = (("duplicate content", digest(content)),)
        counts.seen.append((digests, signature("\n".join(texts))))
        yield dialogue


def _count_characters(dialogue: Dialogue, counts: Counts) -> None:
    counts.tally.kept += 1
    counts.examples += 1
    length = len(dialogue.system or "") + sum(len(turn.text) for turn in dialogue.turns)
    trained = [turn for turn in dialogue.turns if turn.role == "assistant" and turn.supervised]
    counts.length += length
    counts.lengths[length] += 1
    counts.supervised += sum(len(turn.text) for turn in trained)


def _count_tokens(example: Example, counts: Counts) -> None:
    """Count an example; a pair's length is its longer side, and a limit applies to each side."""
    counts.examples += 1
    counts.length += example.tokens
    counts.supervised += example.supervised_tokens
    length = max(example.sides)
    counts.lengths[length] += 1
    if all(length <= limit for limit in counts.cuts):
        return
    before = _supervised_before(example.labels)
    for limit, cut in counts.cuts.items():
        if length <= limit:
            continue
        left = int(before[min(limit, len(before) - 1)])
        cut.examples += 1
        cut.tokens += sum(max(0, side - limit) for side in example.sides)
        cut.supervised += example.supervised_tokens - left
        cut.nothing_left += left == 0


def _supervised_before(labels: Sequence[int]) -> Any:
    """Return the number of supervised tokens before each position and before the end, [n + 1]."""
    supervised = np.asarray(labels) != IGNORE_INDEX
    return np.concatenate(([0], np.cumsum(supervised)))
