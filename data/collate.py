"""Pads the examples of one micro-batch and lists its supervised positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.encode import IGNORE_INDEX, Example


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: B examples of at most T tokens, S of them supervised.

    model_inputs: input_ids [B, T] int64, padded on the right; of pairs also attention_mask [B, T]
    and decoder_input_ids [B, U], in which `positions` and `targets` are found then.
    positions: [S] int64, the flat indices into B x T whose next token is supervised.
    targets: [S] int64, those next tokens.
    seed: of everything random in this forward pass (dropout).
    """

    model_inputs: dict[str, Tensor]
    positions: Tensor
    targets: Tensor
    seed: int

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch on the device."""
        inputs = {name: x.to(device) for name, x in self.model_inputs.items()}
        positions = self.positions.to(device)
        targets = self.targets.to(device)
        return MicroBatch(inputs, positions, targets, self.seed)


@dataclass(frozen=True)
class Collator:
    """Pads the examples of one model; `decoder_start_id` is an encoder-decoder's, else None."""

    pad_id: int
    decoder_start_id: int | None = None

    def __call__(self, examples: Sequence[Example], seed: int) -> MicroBatch:
        """Return a micro-batch; no example at all gives one of weight zero."""
        if self.decoder_start_id is None:
            return collate(examples, self.pad_id, seed)
        return collate_pairs(examples, self.pad_id, self.decoder_start_id, seed)


def collate(examples: Sequence[Example], pad_id: int, seed: int) -> MicroBatch:
    """Pad to the longest example; none at all gives a micro-batch of weight zero, one pad token.

    There is no attention mask: under a causal mask no real token sees a pad on its right, and
    pads carry no label. Padding is known by length, never by id: the pad may be a real token.

    >>> batch = collate([Example("a", [5, 6, 7], [-100, 6, 7], 2)], pad_id=0, seed=1)
    >>> batch.positions.tolist(), batch.targets.tolist()
    ([0, 1], [6, 7])
    """
    input_ids = _padded([example.input_ids for example in examples], pad_id)
    labels = _padded([example.labels for example in examples], IGNORE_INDEX)
    # The logits at t predict the token at t + 1; the last position predicts nothing.
    next_labels = torch.full_like(labels, IGNORE_INDEX)
    next_labels[:, :-1] = labels[:, 1:]
    positions = torch.nonzero(next_labels.flatten() != IGNORE_INDEX).flatten()
    return MicroBatch({"input_ids": input_ids}, positions, next_labels.flatten()[positions], seed)


def collate_pairs(examples: Sequence[Example], pad_id: int, start_id: int, seed: int) -> MicroBatch:
    """Pad sources and targets each to its longest: input_ids [B, T], decoder_input_ids [B, U].

    The decoder reads its start token and the target but its last id, and its `positions` lie in
    B x U. The encoder sees all of its input, so its pads need a mask.

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


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return the rows as [B, T] int64, padded on the right; no row at all as [1, 1]."""
    longest = max(map(len, rows), default=1)
    padded = torch.full((max(1, len(rows)), longest), value)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = torch.tensor(ids)
    return padded
