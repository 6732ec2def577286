"""Turns rendered dialogues into token ids and labels; masks come from character offsets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import UserError
from data.sharegpt import Dialogue, Tally
from data.templates import Rendered, TemplateName, render

IGNORE_INDEX = -100
ENCODE_BATCH = 256  # dialogues a tokenizer call: enough to keep its threads busy


@dataclass(frozen=True)
class Example:
    """A dialogue as token ids; `labels` equal `input_ids` where supervised, else -100.

    A pair, for an encoder-decoder: `input_ids` are its source, `labels` its target, whole.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    supervised_tokens: int
    record: int = 0  # the dialogue's place among those kept by the reader
    is_pair: bool = False

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of the encoder, or of the whole dialogue, and tokens of the decoder."""
        return len(self.input_ids), len(self.labels) * self.is_pair

    @property
    def tokens(self) -> int:
        """Tokens that the model reads and, of a pair, writes."""
        return sum(self.lengths)


def encode_dialogues(
    dialogues: Sequence[Dialogue],
    template: TemplateName,
    tokenizer: Any,
    max_length: int,
    tally: Tally,
) -> list[Example]:
    """Encode dialogues, cut on the right at `max_length` tokens; those with no label are dropped.

    Raises UserError for a tokenizer without character offsets, or when no example is left.
    """
    check_fast(tokenizer)
    examples = []
    for example, length in _encode(dialogues, template, tokenizer, max_length):
        if length > max_length:
            tally.noted[f"cut at {max_length} tokens"] += 1
        if example.supervised_tokens:
            examples.append(example)
        else:
            tally.drop("no supervised token")
    if not examples:
        raise UserError(
            f"none of {tally.read} dialogues has a supervised token within {max_length} tokens "
            f"({tally}). Give a larger --model_max_length or dialogues with answers."
        )
    return examples


def check_fast(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer that does not know which characters a token stands for."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} has no character offsets, which exact masks need. "
            "Use a model with a fast tokenizer (a tokenizer.json)."
        )


def _encode(
    dialogues: Sequence[Dialogue], template: TemplateName, tokenizer: Any, max_length: int
) -> Iterator[tuple[Example, int]]:
    """Yield each example with the length in tokens that it had before it was cut."""
    for begin in range(0, len(dialogues), ENCODE_BATCH):
        batch = dialogues[begin : begin + ENCODE_BATCH]
        rendered = [render(dialogue, template, tokenizer) for dialogue in batch]
        encoded = tokenizer(
            [item.text for item in rendered],
            add_special_tokens=rendered[0].add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        columns = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        rows = enumerate(zip(batch, rendered, columns, strict=True), begin)
        for record, (dialogue, item, (ids, offsets)) in rows:
            cut = ids[:max_length]
            labels = label(cut, offsets[:max_length], item)
            supervised = sum(one != IGNORE_INDEX for one in labels)
            yield Example(dialogue.id, cut, labels, supervised, record), len(ids)


def label(input_ids: list[int], offsets: list[tuple[int, int]], rendered: Rendered) -> list[int]:
    """Return the ids whose characters overlap a supervised span, -100 elsewhere.

    >>> label([5, 6, 7], [(0, 0), (0, 3), (3, 5)], Rendered("abcde", ((3, 5),), False))
    [-100, -100, 7]
    >>> label([5, 6], [(0, 2), (2, 5)], Rendered("abcde", ((3, 5),), False))  # one that straddles
    [-100, 6]
    """
    labels = [IGNORE_INDEX] * len(input_ids)
    spans = iter(rendered.spans)
    start, end = next(spans, (len(rendered.text), len(rendered.text)))
    for position, (token_start, token_end) in enumerate(offsets):
        while token_start >= end and end < len(rendered.text):
            start, end = next(spans, (len(rendered.text), len(rendered.text)))
        if token_start < end and token_end > start:
            labels[position] = input_ids[position]
    return labels
