"""Puts the examples of one micro-batch together and lists its supervised positions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batching.shared_prefix import prefix_groups
from data.encoding.encode import IGNORE_INDEX, Example


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: B examples of at most T tokens, S of them supervised.

    model_inputs: input_ids [B, T] int64, padded on the right, or [1, T] with what tells the
    examples of the row apart, of which groups may share what they begin with; of pairs also
    attention_mask [B, T] and decoder_input_ids [B, U], in which `positions` and `targets` are
    found then.
    positions: [S] int64, the flat indices into B x T whose next token is supervised.
    targets: [S] int64, those next tokens.
    seed: of everything random in this forward pass (dropout).
    """

    model_inputs: dict[str, Any]
    positions: Tensor
    targets: Tensor
    seed: int

    @property
    def tokens(self) -> int:
        """Tokens that are run, padding counted; of pairs both sides."""
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


# The groups of a row: of each, how many tokens its examples share, and how many each has beside.
Groups = Sequence[Sequence[int]]
# What tells a model where the examples of a row begin.
RowInputs = Callable[[Groups], dict[str, Any]]


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches for one model.

    decoder_start_id: an encoder-decoder's, else None. row_inputs: of a model that runs examples in
    one row, else None, and they are padded. sharing: whether what a row's examples begin with alike
    is run once.
    """

    pad_id: int
    decoder_start_id: int | None = None
    row_inputs: RowInputs | None = None
    sharing: bool = False

    def __call__(self, examples: Sequence[Example], seed: int) -> MicroBatch:
        """Return a micro-batch; no example at all gives one of weight zero."""
        if self.row_inputs is not None:
            return collate_row(examples, self.pad_id, seed, self.row_inputs, self.sharing)
        if self.decoder_start_id is None:
            return collate(examples, self.pad_id, seed)
        return collate_pairs(examples, self.pad_id, self.decoder_start_id, seed)


def collate(examples: Sequence[Example], pad_id: int, seed: int) -> MicroBatch:
    """Pad to the longest example; none at all gives a micro-batch of weight zero, one pad token.

    The last supervised token is a target alone. There is no attention mask: under a causal mask no
    real token sees a pad on its right, and pads carry no label. Padding is known by length, never
    by id: the pad may be a real token.

    >>> batch = collate([Example("a", [5, 6, 7], [-100, 6, 7], 2)], pad_id=0, seed=1)
    >>> batch.model_inputs["input_ids"].tolist()
    [[5, 6]]
    >>> batch.positions.tolist(), batch.targets.tolist()
    ([0, 1], [6, 7])
    """
    rows = [_run(example) for example in examples]
    input_ids = _padded([ids for ids, _ in rows], pad_id)
    next_labels = _padded([following for _, following in rows], IGNORE_INDEX).flatten()
    positions = torch.nonzero(next_labels != IGNORE_INDEX).flatten()
    return MicroBatch({"input_ids": input_ids}, positions, next_labels[positions], seed)


def collate_row(
    examples: Sequence[Example],
    pad_id: int,
    seed: int,
    row_inputs: RowInputs,
    sharing: bool = False,
) -> MicroBatch:
    """Put examples behind each other in one row [1, T]; none at all gives one pad token.

    >>> two = [Example("a", [5, 6, 9], [-100, 6, -100], 1), Example("b", [7, 8, 2], [7, 8, 2], 1)]
    >>> batch = collate_row(two, 0, 1, lambda groups: {"groups": groups})
    >>> batch.model_inputs["input_ids"].tolist(), batch.model_inputs["groups"]
    ([[5, 7, 8]], [[0, 1], [0, 2]])
    >>> batch.positions.tolist(), batch.targets.tolist()  # 7 begins the row's second example
    ([0, 1, 2], [6, 8, 2])
    """
    alike = prefix_groups(examples) if sharing else [(0, [example]) for example in examples]
    ids, labels, groups = [], [], []
    for shared, group in alike:
        rows = [_run(example) for example in group]
        ids += rows[0][0][:shared] + [token for row, _ in rows for token in row[shared:]]
        labels += [IGNORE_INDEX] * shared
        labels += [label for _, following in rows for label in following[shared:]]
        groups.append([shared, *(len(row) - shared for row, _ in rows)])
    if not examples:
        ids, labels, groups = [pad_id], [IGNORE_INDEX], [[0, 1]]
    next_labels = torch.tensor(labels)
    positions = torch.nonzero(next_labels != IGNORE_INDEX).flatten()
    inputs = {"input_ids": torch.tensor([ids]), **row_inputs(groups)}
    return MicroBatch(inputs, positions, next_labels[positions], seed)


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


def _run(example: Example) -> tuple[list[int], list[int]]:
    """Return a dialogue's tokens that are run, and for each the label of the one behind it."""
    length, _ = example.lengths
    return example.input_ids[:length], example.labels[1 : length + 1]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return the rows as [B, T] int64, padded on the right; no row at all as [1, 1]."""
    longest = max(map(len, rows), default=1)
    padded = torch.full((max(1, len(rows)), longest), value)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = torch.tensor(ids)
    return padded
