"""Deals examples into windows: all micro-batches of one optimizer step over all ranks."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil
from typing import Protocol, TypeVar

import numpy as np
import torch

from data.batching.balance import Limits, deal, squares
from data.batching.collate import MicroBatch
from data.encoding.encode import Example
from data.errors import UserError
from loop.config.flags import Config

Collate = Callable[[Sequence[Example], int], MicroBatch]  # examples, random seed
T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """How a window is split; the gradient does not depend on it."""

    rank: int
    world_size: int
    micro_batch_size: int  # most examples a rank runs at once
    accumulation: int  # micro-batches a rank runs in a full step, if tokens ask for no more
    global_batch_size: int  # examples in a full window, over all ranks
    steps_per_epoch: int
    total_steps: int
    limits: Limits = Limits(8)

    @property
    def divisor(self) -> int:
        """What a backward pass divides by, which the loss scale undoes.

        DeepSpeed offloads sums only where this is more than 1 (0.19.8, zero/stage_1_and_2.py).
        """
        varies = self.limits.tokens is not None or self.limits.finer
        return max(self.accumulation, 2 if varies else 1)

    def __str__(self) -> str:
        tokens = f" or {self.limits.tokens} tokens" if self.limits.tokens else ""
        how = "in one row without padding" if self.limits.packed else "padded"
        return (
            f"{self.total_steps} steps, {self.steps_per_epoch} an epoch, of "
            f"{self.global_batch_size} examples: {_many(self.world_size, 'rank')} x "
            f"{_many(self.accumulation, 'micro-batch')} of at most {self.micro_batch_size}"
            f"{tokens}, {how}"
        )


@dataclass(frozen=True)
class Window:
    """One step's work: this rank's micro-batches and the counts over all ranks."""

    step: int  # optimizer steps done before this one
    epoch: float  # epochs done after it
    micro_batches: list[MicroBatch]
    examples: int
    tokens: int  # padding not counted; of pairs both sides
    padded_tokens: int  # that are run: padding counted, what a row's examples share but once
    busiest_tokens: int  # that are run, of the rank that has most
    squared_tokens: int  # the sum of the examples' squared lengths, what they share but once
    supervised_tokens: int
    ids: tuple[str, ...]

    def on(self, device: torch.device) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield the micro-batches on the device, each with whether it is the step's last."""
        for micro_batch in self.micro_batches:
            yield micro_batch.to(device), micro_batch is self.micro_batches[-1]


class Ranks(Protocol):
    """What of accelerate's PartialState a layout depends on."""

    @property
    def process_index(self) -> int: ...

    @property
    def num_processes(self) -> int: ...


def plan_layout(config: Config, examples: int, ranks: Ranks, packed: bool = False) -> Layout:
    """Split the global batch over ranks and accumulation; the last window of an epoch is short.

    Raises UserError for a single step that is all warm-up.
    """
    world_size, per_device = ranks.num_processes, config.per_device_train_batch_size
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
    # What one micro-batch more costs a GPU was not measured.
    finer = not packed and not torch.cuda.is_available()
    # FlashAttention-2 takes queries and keys of the same places.
    sharing = packed and not config.flash_attn
    # To begin with one example at most, as long as it may be (loop/training/auto_micro_batch.py).
    tokens = config.model_max_length if config.auto_micro_batch else config.tokens_per_micro_batch
    limits = Limits(per_device, tokens, packed, finer, sharing)
    split = (ranks.process_index, world_size, per_device, accumulation)
    return Layout(*split, batch, per_epoch, steps, limits)


def global_batch_size(config: Config, world_size: int) -> int:
    """Return the examples of a full window: as asked, or ranks x accumulation x micro-batch."""
    accumulation = config.gradient_accumulation_steps or 1
    per_rank = accumulation * config.per_device_train_batch_size
    return config.global_batch_size or world_size * per_rank


def windows(
    examples: Sequence[Example], layout: Layout, seed: int, collate: Collate, start: int = 0
) -> Iterator[Window]:
    """Yield this rank's windows from step `start` on; an epoch's permutation is f(seed, epoch)."""
    for step, chosen in drawn(examples, layout, seed, start):
        epoch, index = divmod(step, layout.steps_per_epoch)
        dealt = deal(chosen, layout.world_size, layout.limits)
        yield Window(
            step=step,
            epoch=epoch + min(1.0, (index + 1) * layout.global_batch_size / len(examples)),
            micro_batches=[
                collate(part, _random_seed(seed, step, layout.rank, slot))
                for slot, part in enumerate(dealt.ranks[layout.rank])
            ],
            examples=len(chosen),
            tokens=sum(example.run_tokens for example in chosen),
            padded_tokens=sum(dealt.tokens),
            busiest_tokens=max(dealt.tokens),
            squared_tokens=squares(chosen, dealt, layout.limits),
            supervised_tokens=sum(example.supervised_tokens for example in chosen),
            ids=tuple(example.id for example in chosen),
        )


def drawn(
    examples: Sequence[Example], layout: Layout, seed: int, start: int = 0
) -> Iterator[tuple[int, list[Example]]]:
    """Yield each step, counted from 0, with the examples of its window."""
    size = layout.global_batch_size
    for step in range(start, layout.total_steps):
        epoch, index = divmod(step, layout.steps_per_epoch)
        if index == 0 or step == start:
            order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        yield step, [examples[i] for i in order[index * size : (index + 1) * size]]


def prefetched(items: Iterator[T]) -> Iterator[T]:
    """Yield the items, each made in a thread while the one before it is used."""
    with ThreadPoolExecutor(1) as other:
        waiting = other.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = other.submit(next, items, None)
            yield item


def _random_seed(*key: int) -> int:
    """Return a 63-bit seed: resuming needs no stored generator, only (seed, step, rank, slot)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") else "s")
