"""Labels the supervised tokens of an example as reasoning, tool calls or content."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

from data.dialogues.sharegpt import Tally
from data.encoding.encode import IGNORE_INDEX, Example, label
from data.encoding.encoder import encoder_of
from data.encoding.templates import Rendered, render_examples
from loop.config.flags import Config
from loop.inputs.training_data import select_dialogues
from loop.model.base import BaseModel

Part = Literal["context", "reasoning", "tool calls", "answer"]  # context: not supervised


def with_parts(
    config: Config, base: BaseModel, examples: Sequence[Example]
) -> Iterator[tuple[Example, list[Part]]]:
    """Yield each example with the part of each token; the dialogues are rendered again.

    Encoded examples keep no spans. config: renders the dialogues as the examples were. base: has
    template chat.
    """
    dialogues = enumerate(select_dialogues(config, False, Tally()))
    for record, group in groupby(examples, key=lambda example: example.record):
        dialogue = next(one for number, one in dialogues if number == record)
        items = render_examples(dialogue, base.template, base.tokenizer, config.rendering)
        of_turn = {answer.turn: item for item in items for answer in item.located}
        for example in group:
            item = items[0] if example.turn is None else of_turn[example.turn]
            yield example, parts_of(item, example.labels, base.tokenizer)


def parts_of(item: Rendered, labels: Sequence[int], tokenizer: Any) -> list[Part]:
    """Return the part of each token; the places that decide labels decide parts."""
    spans = tuple(span for answer in item.located for span in (answer.reasoning, answer.calls))
    ((ids, placed_spans, placed),) = encoder_of(tokenizer)([replace(item, spans=spans)])
    ids = ids[: len(labels)]
    reasoning, calls = (
        label(ids, placed, [span for span in placed_spans[first::2] if span[0] < span[1]])[0]
        for first in (0, 1)
    )
    parts: list[Part] = []
    for supervised, thought, call in zip(labels, reasoning, calls, strict=True):
        if supervised == IGNORE_INDEX:
            parts.append("context")
        elif thought != IGNORE_INDEX:
            parts.append("reasoning")
        else:
            parts.append("answer" if call == IGNORE_INDEX else "tool calls")
    return parts
