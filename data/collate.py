"""Pads the examples of one micro-batch and lists its supervised positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.encode import IGNORE_INDEX, Example


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: B examples of at most T tokens, S of them supervised.

    model_inputs: input_ids [B, T] int64, padded on the right.
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


def collate(examples: Sequence[Example], pad_id: int, seed: int) -> MicroBatch:
    """Pad to the longest example; none at all gives a micro-batch of weight zero, one pad token.

    There is no attention mask: under a causal mask no real token sees a pad on its right, and
    pads carry no label. Padding is known by length, never by id: the pad may be a real token.

    >>> batch = collate([Example("a", [5, 6, 7], [-100, 6, 7], 2)], pad_id=0, seed=1)
    >>> batch.positions.tolist(), batch.targets.tolist()
    ([0, 1], [6, 7])
    """
    longest = max((len(example.input_ids) for example in examples), default=1)
    input_ids = torch.full((max(1, len(examples)), longest), pad_id)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for row, example in enumerate(examples):
        input_ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    # The logits at t predict the token at t + 1; the last position predicts nothing.
    next_labels = torch.full_like(labels, IGNORE_INDEX)
    next_labels[:, :-1] = labels[:, 1:]
    positions = torch.nonzero(next_labels.flatten() != IGNORE_INDEX).flatten()
    return MicroBatch({"input_ids": input_ids}, positions, next_labels.flatten()[positions], seed)
