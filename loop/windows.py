"""Deals examples into windows: all micro-batches of one optimizer step over all ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from data.collate import MicroBatch
from data.encode import Example
from data.errors import UserError
from loop.config import Config

Collate = Callable[[Sequence[Example], int], MicroBatch]  # examples, random seed


@dataclass(frozen=True)
class Layout:
    """How a window is split; the gradient does not depend on it."""

    rank: int
    world_size: int
    micro_batch_size: int  # most examples a rank runs at once
    accumulation: int  # micro-batches a rank runs each step
    global_batch_size: int  # examples in a full window, over all ranks
    steps_per_epoch: int
    total_steps: int

    def __str__(self) -> str:
        return (
            f"{self.total_steps} steps, {self.steps_per_epoch} an epoch, of "
            f"{self.global_batch_size} examples: {_many(self.world_size, 'rank')} x "
            f"{_many(self.accumulation, 'micro-batch')} of at most {self.micro_batch_size}"
        )


@dataclass(frozen=True)
class Window:
    """One step's work: this rank's micro-batches and the counts over all ranks."""

    step: int  # optimizer steps done before this one
    epoch: float  # epochs done after it
    micro_batches: list[MicroBatch]
    examples: int
    tokens: int  # padding not counted; of pairs both sides
    supervised_tokens: int


def plan_layout(config: Config, examples: int, rank: int, world_size: int) -> Layout:
    """Split the global batch over ranks and accumulation; the last window of an epoch is short."""
    per_device = config.per_device_train_batch_size
    # A window is never more than the epoch: no rank counts through empty micro-batches for nothing.
    batch = min(global_batch_size(config, world_size), examples)
    accumulation = ceil(batch / (world_size * per_device))
    per_device = min(per_device, ceil(batch / world_size))
    per_epoch = ceil(examples / batch)
    steps = config.max_steps if config.max_steps > 0 else ceil(config.num_train_epochs * per_epoch)
    if steps == 1 and config.warmup_ratio > 0 and config.lr_scheduler_type != "constant":
        raise UserError(
            f"found one step, which is warm-up with learning rate 0 (--warmup_ratio "
            f"{config.warmup_ratio:g}); expected more. Give --warmup_ratio 0, or train longer."
        )
    return Layout(rank, world_size, per_device, accumulation, batch, per_epoch, steps)


def global_batch_size(config: Config, world_size: int) -> int:
    """Return the examples of a full window: as asked, or ranks x accumulation x micro-batch."""
    accumulation = config.gradient_accumulation_steps or 1
    per_rank = accumulation * config.per_device_train_batch_size
    return config.global_batch_size or world_size * per_rank


def windows(
    examples: Sequence[Example], layout: Layout, seed: int, collate: Collate, start: int = 0
) -> Iterator[Window]:
    """Yield this rank's windows from step `start` on; an epoch's permutation is f(seed, epoch)."""
    size = layout.global_batch_size
    for step in range(start, layout.total_steps):
        epoch, index = divmod(step, layout.steps_per_epoch)
        if index == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        chosen = [examples[i] for i in order[index * size : (index + 1) * size]]
        yield Window(
            step=step,
            epoch=epoch + min(1.0, (index + 1) * size / len(examples)),
            micro_batches=[
                collate(part, _random_seed(seed, step, layout.rank, slot))
                for slot, part in enumerate(_deal(chosen, layout))
            ],
            examples=len(chosen),
            tokens=sum(example.tokens for example in chosen),
            supervised_tokens=sum(example.supervised_tokens for example in chosen),
        )


def _deal(chosen: list[Example], layout: Layout) -> list[list[Example]]:
    """Return this rank's micro-batches, `accumulation` of them; some may be empty.

    Neighbours in length share a micro-batch, which saves padding, and the ranks run neighbours at
    the same time, which saves waiting.
    """
    parts = _alike(chosen, layout.accumulation * layout.world_size)
    return parts[layout.rank :: layout.world_size]


def _alike(chosen: list[Example], parts: int) -> list[list[Example]]:
    """Split examples into parts of like size and like lengths, the longest first.

    Each half of them is sorted anew, by the side of the pairs whose padding it cuts most. Of
    dialogues, which have one side, that is one order by length.
    """
    if parts == 1:
        return [chosen]
    half = parts // 2
    middle = round(half * len(chosen) / parts)
    lengths = (lambda e: -max(e.lengths), lambda e: -e.lengths[0], lambda e: -e.lengths[1])
    orders = [sorted(chosen, key=length) for length in lengths]
    halves = min(
        ((order[:middle], order[middle:]) for order in orders),
        key=lambda halves: sum(map(_padded_tokens, halves)),
    )
    return _alike(halves[0], half) + _alike(halves[1], parts - half)


def _padded_tokens(examples: list[Example]) -> int:
    """Return the tokens of one micro-batch of these, padding included."""
    return len(examples) * sum(
        max((example.lengths[side] for example in examples), default=0) for side in range(2)
    )


def _random_seed(*key: int) -> int:
    """Return a 63-bit seed: resuming needs no stored generator, only (seed, step, rank, slot)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") else "s")
