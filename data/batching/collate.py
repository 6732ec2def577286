"""Collates the examples of a micro-batch into tensors and lists its supervised positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batching.shared_prefix import Segments, row_segments, shared_prefixes
from data.encoding.encode import IGNORE_INDEX, Example


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: B examples of at most T tokens, with S supervised tokens.

    model_inputs: one of three forms.
        Padded: input_ids [B, T] int64, padded on the right.
        One row: input_ids [1, T], and the inputs that separate the examples.
        Pairs: input_ids and attention_mask [B, T], decoder_input_ids [B, U].
    positions: [S] int64, flat indices into [B, T] (pairs: [B, U]) whose next token is supervised.
        In a row, an index occurs once for each example that shares the token and supervises the
        next one.
    targets: [S] int64, these next tokens, in the order of the examples.
    seed: for all randomness of this forward pass (dropout).
    """

    model_inputs: dict[str, Any]
    positions: Tensor
    targets: Tensor
    seed: int

    @property
    def tokens(self) -> int:
        """Number of computed tokens, with padding, of both sides for pairs."""
        sides = ("input_ids", "decoder_input_ids")
        return sum(x.numel() for name, x in self.model_inputs.items() if name in sides)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch on the device."""
        inputs = {
            name: x.to(device) if isinstance(x, Tensor) else x
            for name, x in self.model_inputs.items()
        }
        positions = self.positions.to(device)
        targets = self.targets.to(device)
        return MicroBatch(inputs, positions, targets, self.seed)


# Returns the model inputs that separate the segments of a row.
RowInputs = Callable[[Segments], dict[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Collates micro-batches for one model.

    decoder_start_id: the start token of an encoder-decoder; None for other models.
    row_inputs: returns the inputs of a model that takes examples in one row; None: examples are
    padded.
    sharing: whether a shared prefix in a row is computed once.
    """

    pad_id: int
    decoder_start_id: int | None = None
    row_inputs: RowInputs | None = None
    sharing: bool = False

    def __call__(
        self, examples: Sequence[Example], seed: int, shared: Sequence[int] | None = None
    ) -> MicroBatch:
        """Return a micro-batch; without examples, it has no targets.

        shared: the result of `shared_prefixes`, if known; only read with `sharing`.
        """
        if self.row_inputs is not None:
            if not self.sharing:
                shared = [0] * len(examples)
            elif shared is None:
                shared = shared_prefixes(examples)
            return collate_row(examples, shared, self.pad_id, seed, self.row_inputs)
        if self.decoder_start_id is None:
            return collate(examples, self.pad_id, seed)
        return collate_pairs(examples, self.pad_id, self.decoder_start_id, seed)


def collate(examples: Sequence[Example], pad_id: int, seed: int) -> MicroBatch:
    """Pad to the longest example; without examples, return one pad token without a target.

    The last supervised token is only a target, not an input. No attention mask is needed: under a
    causal mask, no token attends to a pad on its right, and pads have no label. Padding is located
    by length, because the id of the pad token may also occur in the text.

    >>> batch = collate([Example("a", [5, 6, 7], [-100, 6, 7], 2)], pad_id=0, seed=1)
    >>> batch.model_inputs["input_ids"].tolist()
    [[5, 6]]
    >>> batch.positions.tolist(), batch.targets.tolist()
    ([0, 1], [6, 7])
    """
    rows = [_computed(example) for example in examples]
    input_ids = _padded([ids for ids, _ in rows], pad_id)
    next_labels = _padded([labels for _, labels in rows], IGNORE_INDEX).flatten()
    positions = torch.nonzero(next_labels != IGNORE_INDEX).flatten()
    return MicroBatch({"input_ids": input_ids}, positions, next_labels[positions], seed)


def collate_row(
    examples: Sequence[Example],
    shared: Sequence[int],
    pad_id: int,
    seed: int,
    row_inputs: RowInputs,
) -> MicroBatch:
    """Concatenate examples in one row [1, T], shared prefixes once; without examples, one pad.

    >>> a, b = Example("a", [5, 6, 9], [-100, 6, -100], 1), Example("b", [7, 8, 2], [7, 8, 2], 1)
    >>> batch = collate_row([a, b], [0, 0], 0, 1, lambda segments: {"segments": segments})
    >>> batch.model_inputs["input_ids"].tolist(), batch.model_inputs["segments"]
    ([[5, 7, 8]], [(0, 1), (0, 2)])
    >>> batch.positions.tolist(), batch.targets.tolist()  # 7 is the first token of b
    ([0, 1, 2], [6, 8, 2])
    """
    ids: list[int] = []
    places = torch.empty(0, dtype=torch.int64)  # in the row, of the last segment's tokens
    positions, targets = [places], [places]
    for example, common in zip(examples, shared, strict=True):
        row, next_labels = _computed(example)
        if own := len(row) - common:
            places = torch.cat([places[:common], torch.arange(len(ids), len(ids) + own)])
            ids += row[common:]
        labels = torch.tensor(next_labels)
        supervised = labels != IGNORE_INDEX
        positions.append(places[: len(row)][supervised])
        targets.append(labels[supervised])
    segments = row_segments(examples, shared) or [(0, 1)]
    inputs = {"input_ids": torch.tensor([ids or [pad_id]]), **row_inputs(segments)}
    return MicroBatch(inputs, torch.cat(positions), torch.cat(targets), seed)


def collate_pairs(examples: Sequence[Example], pad_id: int, start_id: int, seed: int) -> MicroBatch:
    """Pad sources to the longest source [B, T], and targets to the longest target [B, U].

    The decoder's input is the start token and the target without its last id. `positions` are flat
    indices into [B, U]. The encoder attends to its complete input, so its pads need a mask.

    >>> pair = Example("a", [5, 6, 1], [7, 8, 1], 3, is_pair=True)
    >>> batch = collate_pairs([pair], pad_id=0, start_id=0, seed=1)
    >>> batch.model_inputs["decoder_input_ids"].tolist(), batch.targets.tolist()
    ([[0, 7, 8]], [7, 8, 1])
    """
    input_ids = _padded([example.input_ids for example in examples], pad_id)
    mask = _padded([[1] * len(example.input_ids) for example in examples], 0)
    labels = _padded([example.labels for example in examples], IGNORE_INDEX)
    started = [[start_id, *example.labels[:-1]] for example in examples]
    if not examples:
        mask[:], started = 1, [[start_id]]
    positions = torch.nonzero(labels.flatten() != IGNORE_INDEX).flatten()
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "decoder_input_ids": _padded(started, pad_id),
    }
    return MicroBatch(inputs, positions, labels.flatten()[positions], seed)


def _computed(example: Example) -> tuple[list[int], list[int]]:
    """Return the computed tokens of a dialogue, and the label of each one's next token."""
    length, _ = example.lengths
    return example.input_ids[:length], example.labels[1 : length + 1]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return the rows as [B, T] int64, padded on the right; without rows, [1, 1] padding."""
    longest = max(map(len, rows), default=1)
    padded = torch.full((max(1, len(rows)), longest), value)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = torch.tensor(ids)
    return padded
