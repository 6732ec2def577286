"""Cuts the data into windows; a window holds one optimizer step's micro-batches of all ranks."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from data.batching.balance import assign_micro_batches
from data.batching.collate import MicroBatch
from data.encoding.encode import Example
from loop.distributed.layout import Layout

# Collates examples into a micro-batch. Arguments: examples, random seed, shared prefixes.
Collate = Callable[[Sequence[Example], int, Sequence[int] | None], MicroBatch]
T = TypeVar("T")


@dataclass(frozen=True)
class Window:
    """One rank's micro-batches of one step; the counts are over all ranks."""

    step: int  # counted from 0
    epoch: float  # epochs done after this step
    micro_batches: list[MicroBatch]
    examples: int
    tokens: int  # without padding; of pairs, both sides
    padded_tokens: int  # computed tokens: includes padding, counts shared prefixes once
    busiest_tokens: int  # maximum over ranks of a rank's computed tokens
    squared_tokens: int  # sum of the examples' squared lengths, shared prefixes once
    supervised_tokens: int
    ids: tuple[str, ...]  # of the examples

    def micro_batches_on(self, device: torch.device) -> Iterator[tuple[MicroBatch, bool]]:
        """Yield each micro-batch on the device, and whether it is the step's last."""
        for micro_batch in self.micro_batches:
            yield micro_batch.to(device), micro_batch is self.micro_batches[-1]


def windows(
    examples: Sequence[Example], layout: Layout, seed: int, collate: Collate, start: int = 0
) -> Iterator[Window]:
    """Yield this rank's windows from step `start`. The order depends only on seed and epoch."""
    for step, chosen in drawn(examples, layout, seed, start):
        epoch, index = divmod(step, layout.steps_per_epoch)
        assignment = assign_micro_batches(chosen, layout.world_size, layout.limits)
        yield Window(
            step=step,
            epoch=epoch + min(1.0, (index + 1) * layout.global_batch_size / len(examples)),
            micro_batches=[
                collate(batch.examples, _random_seed(seed, step, layout.rank, slot), batch.shared)
                for slot, batch in enumerate(assignment.ranks[layout.rank])
            ],
            examples=len(chosen),
            tokens=sum(example.run_tokens for example in chosen),
            padded_tokens=sum(assignment.tokens),
            busiest_tokens=max(assignment.tokens),
            squared_tokens=assignment.squared_tokens,
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
    """Yield the items; a thread computes the next item while the caller uses the current one."""
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = thread.submit(next, items, None)
            yield item


def _random_seed(*key: int) -> int:
    """Return a 63-bit seed from (seed, step, rank, slot). So a resume restores no random state."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
