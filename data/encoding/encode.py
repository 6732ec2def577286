"""Encodes dialogues as token ids and labels; the places of the tokens decide the labels."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, count, islice
from typing import Any

from data.dialogues.sharegpt import Dialogue, Tally
from data.encoding.control_tokens import Encoder
from data.encoding.templates import Rendered, Span, TemplateName, render
from data.encoding.token_offsets import Placed, Places
from data.errors import UserError

IGNORE_INDEX = -100
ENCODE_BATCH = 128  # dialogues per tokenizer call: enough to keep its threads busy


@dataclass(frozen=True)
class Example:
    """A dialogue as token ids; `labels` equal `input_ids` where supervised, else -100.

    In a pair for an encoder-decoder, `input_ids` is the source and `labels` the complete target.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    supervised_tokens: int
    record: int = 0  # index of the dialogue among those that the reader keeps
    is_pair: bool = False
    share: float = 0.0  # the dialogue's number in [0, 1); low numbers are held out

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Computed tokens of encoder and decoder; for a dialogue, its computed tokens and 0.

        A dialogue is computed up to the token that predicts the last supervised token. The loss
        does not depend on later tokens.
        """
        if self.is_pair:
            return len(self.input_ids), len(self.labels)
        last = len(self.labels) - 1
        while last > 1 and self.labels[last] == IGNORE_INDEX:
            last -= 1
        return max(1, last), 0

    @cached_property
    def unsupervised_prefix(self) -> int:
        """Number of computed tokens at the start that predict no supervised token."""
        supervised = map(IGNORE_INDEX.__ne__, islice(self.labels, 1, None))
        return min(next(compress(count(), supervised), len(self.labels)), self.run_tokens - 1)

    @property
    def run_tokens(self) -> int:
        """Number of computed tokens, of both sides for a pair."""
        return sum(self.lengths)

    @property
    def sides(self) -> tuple[int, int]:
        """All tokens of source and target; for a dialogue, all its tokens and 0."""
        return len(self.input_ids), len(self.labels) * self.is_pair

    @property
    def tokens(self) -> int:
        """Number of all tokens, of both sides for a pair."""
        return sum(self.sides)


def encode_dialogues(
    dialogues: Iterable[Dialogue],
    template: TemplateName,
    tokenizer: Any,
    max_length: int,
    tally: Tally,
) -> Iterator[Example]:
    """Yield encoded dialogues, truncated on the right to `max_length` tokens.

    A dialogue without a supervised token is dropped. Raises UserError for a tokenizer without
    character offsets, and for an answer that does not end with a control token.
    """
    check_fast(tokenizer)
    encoder = Encoder(tokenizer)
    for begin, batch, rendered, encoded in _encoded_ahead(dialogues, template, encoder):
        rows = zip(batch, rendered, encoded, strict=True)
        for record, (dialogue, item, (ids, spans, placed)) in enumerate(rows, begin):
            cut = ids[:max_length]
            labels, ends = label(cut, placed, spans)
            _count_ends(dialogue, ends, len(spans), len(ids) > max_length, encoder, tally)
            if len(ids) > max_length:
                tally.noted[f"cut at {max_length} tokens"] += 1
            supervised = len(labels) - labels.count(IGNORE_INDEX)
            if supervised:
                tally.kept += 1
                share = dialogue.share
                yield Example(dialogue.id, cut, labels, supervised, record, share=share)
            else:
                tally.drop(_why_unsupervised(item, max_length), dialogue.id)


def _encoded_ahead(
    dialogues: Iterable[Dialogue], template: TemplateName, encoder: Encoder
) -> Iterator[tuple[int, list[Dialogue], list[Rendered], list[Placed]]]:
    """Yield encoded batches with the index of their first dialogue.

    A thread encodes the next batch while the caller uses one.
    """
    with ThreadPoolExecutor(1) as other:
        waiting = None
        for begin, batch in batches(dialogues):
            rendered = [render(dialogue, template, encoder.tokenizer) for dialogue in batch]
            following = begin, batch, rendered, other.submit(encoder, rendered)
            if waiting:
                yield *waiting[:3], waiting[3].result()
            waiting = following
        if waiting:
            yield *waiting[:3], waiting[3].result()


def batches(dialogues: Iterable[Dialogue]) -> Iterator[tuple[int, list[Dialogue]]]:
    """Yield batches of ENCODE_BATCH dialogues, each with the index of its first dialogue."""
    rest, begin = iter(dialogues), 0
    while batch := [*islice(rest, ENCODE_BATCH)]:
        yield begin, batch
        begin += len(batch)


def check_fast(tokenizer: Any) -> None:
    """Raise UserError for a tokenizer without character offsets."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} has no character offsets, which exact labels need. "
            "Use a model with a fast tokenizer (a tokenizer.json)."
        )


def _count_ends(
    dialogue: Dialogue, ends: list[int], answers: int, cut: bool, encoder: Encoder, tally: Tally
) -> None:
    """Count the answers, and those whose end token is supervised.

    Raises UserError for an answer without a control token at its end, unless it is truncated.
    """
    tally.answers += answers
    tally.ended += len(ends)
    other = next((end for end in ends if end not in encoder.control_ids), None)
    if other is not None or (len(ends) < answers and not cut):
        found = "nothing" if other is None else repr(encoder.tokenizer.convert_ids_to_tokens(other))
        raise UserError(
            f"dialogue {dialogue.id}: found {found} at an answer's end; expected a control token, "
            "so that the model learns to end an answer. Use another --template."
        )


def _why_unsupervised(rendered: Rendered, max_length: int) -> str:
    if rendered.spans:
        return f"no supervised token within {max_length}"
    return "no answer to supervise"


def label(
    input_ids: list[int], placed: Places, spans: Sequence[Span]
) -> tuple[list[int], list[int]]:
    """Return labels, and the last id of each span; an id that overlaps no span has label -100.

    >>> label([5, 6, 7], ([0, 0, 3], [0, 3, 5]), [(3, 5)])
    ([-100, -100, 7], [7])
    >>> label([5, 6], ([0, 2], [2, 5]), [(3, 5)])  # 6 straddles the span's start
    ([-100, 6], [6])
    """
    labels, last_ids, (starts, ends) = [IGNORE_INDEX] * len(input_ids), list[int](), placed
    # A binary search, because a loop over the tokens took most of the Python time.
    for start, end in spans:
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        labels[first:stop] = input_ids[first:stop]
        last_ids += input_ids[bisect_left(ends, end, first, max(first, stop)) : stop]
    return labels, last_ids
