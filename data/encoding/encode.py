"""Encodes dialogues as token ids and labels; the places of the tokens decide the labels."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import OnBadRecord, Tally, bad_record_error
from data.encoding.chat_answers import Span
from data.encoding.encoder import Encoder
from data.encoding.templates import (
    DEFAULT,
    Rendered,
    RenderSettings,
    TemplateName,
    render_examples,
)
from data.encoding.token_offsets import Placed, Places
from data.errors import BadRecord, UserError

T = TypeVar("T")
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
    share: float = 0.0  # of the dialogue, in [0, 1): decides whether it is held out
    turn: int | None = None  # index of the message, for an example of one answer of a dialogue

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
    settings: RenderSettings = DEFAULT,
    on_bad_record: OnBadRecord = "fail",
) -> Iterator[Example]:
    """Yield encoded dialogues, truncated on the right to `max_length` tokens.

    Raises UserError for a tokenizer without character offsets, and for a dialogue that the template
    cannot show unless `on_bad_record` is "skip".
    """
    check_fast(tokenizer)
    encoder = Encoder(tokenizer)

    def rendered(dialogue: Dialogue) -> list[Rendered]:
        try:
            return render_examples(dialogue, template, tokenizer, settings)
        except BadRecord as bad:
            if on_bad_record == "fail":
                raise bad_record_error(dialogue.place, dialogue.id, bad) from None
            tally.drop(bad.cause, dialogue.id)
            return []

    for record, dialogue, rows in _encoded_ahead(dialogues, rendered, encoder):
        made = [*_examples(record, dialogue, rows, max_length, encoder, tally)]
        if made:
            tally.kept += 1
            tally.noted.update(["dialogues with an example for each answer"] * (len(rows) > 1))
        else:
            has_answer = any(item.spans for item, _ in rows)
            tally.drop(_why_unsupervised(has_answer, max_length), dialogue.id)
        yield from made


Rows = list[tuple[Rendered, Placed]]


def _examples(
    record: int,
    dialogue: Dialogue,
    rows: Rows,
    max_length: int,
    encoder: Encoder,
    tally: Tally,
) -> Iterator[Example]:
    """Yield the examples of a dialogue that have a supervised token; count its answers."""
    share = dialogue.share
    for item, (ids, spans, placed) in rows:
        cut = ids[:max_length]
        labels, ends = label(cut, placed, spans)
        tally.answers += item.answers
        tally.noted.update(item.notes)
        _count_ends(dialogue, item, ends, encoder, tally)
        if len(ids) > max_length:
            tally.noted[f"cut at {max_length} tokens"] += 1
        if supervised := len(labels) - labels.count(IGNORE_INDEX):
            yield Example(dialogue.id, cut, labels, supervised, record, share=share, turn=item.turn)


def _encoded_ahead(
    dialogues: Iterable[Dialogue], render: Callable[[Dialogue], list[Rendered]], encoder: Encoder
) -> Iterator[tuple[int, Dialogue, Rows]]:
    """Yield each dialogue with its index and its encoded texts; a thread encodes the next batch.

    A dialogue that was dropped has no texts and is left out.
    """

    def joined(begin: int, batch: list[Dialogue], texts: list[list[Rendered]], encoded: Any) -> Any:
        placed = iter(encoded.result())
        for record, (dialogue, items) in enumerate(zip(batch, texts, strict=True), begin):
            if items:
                yield record, dialogue, [(item, next(placed)) for item in items]

    with ThreadPoolExecutor(1) as other:
        waiting = None
        for begin, batch in batches(dialogues):
            texts = [render(dialogue) for dialogue in batch]
            flat = [item for items in texts for item in items]
            following = begin, batch, texts, other.submit(encoder, flat)
            if waiting:
                yield from joined(*waiting)
            waiting = following
        if waiting:
            yield from joined(*waiting)


def batches(dialogues: Iterable[T]) -> Iterator[tuple[int, list[T]]]:
    """Yield batches of ENCODE_BATCH dialogues, each with the index of its first."""
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
    dialogue: Dialogue, item: Rendered, ends: list[int], encoder: Encoder, tally: Tally
) -> None:
    """Count the answers whose closing token is supervised: all but the truncated ones."""
    closers = [end for end in ends if end in encoder.control_ids]
    tally.ended += len(closers)
    tally.closers.update(map(encoder.name_of, closers))
    other = next((end for end in ends if end not in encoder.control_ids), None)
    if other is not None and len(item.ends) == item.answers and not item.cuts:
        raise UserError(
            f"dialogue {dialogue.id}: found {encoder.name_of(other)!r} at an answer's end; "
            "expected a control token of the tokenizer, with which the model ends an answer. Use "
            "another --template."
        )


def _why_unsupervised(has_answer: bool, max_length: int) -> str:
    return f"no supervised token within {max_length}" if has_answer else "no answer to supervise"


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
