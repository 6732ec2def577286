"""Cuts the data into windows; a window holds one optimizer step's micro-batches of all ranks."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from data.batching.balance import assign_micro_batches
from data.batching.collate import MicroBatch
from data.encoding.cache import Examples
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
    firsts = _firsts(examples)
    for step in range(start, layout.total_steps):
        epoch, index = divmod(step, layout.steps_per_epoch)
        if index == 0 or step == start:
            order = _order(firsts, len(examples), seed, epoch)
        yield step, [examples[i] for i in order[index * size : (index + 1) * size]]


def _firsts(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the index of each dialogue's first example.

    Consecutive examples of the answers of one record are one dialogue (`Example.turn`). Any other
    example is a dialogue of its own.
    """
    if isinstance(examples, Examples):
        records, of_answers = examples.records()
    else:
        records = np.array([example.record for example in examples], np.int64)
        of_answers = np.array([example.turn is not None for example in examples], np.bool_)
    continues = (np.diff(records) == 0) & of_answers[1:] & of_answers[:-1]
    return np.flatnonzero(np.concatenate([[True], ~continues]))


def _order(firsts: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the epoch's order: dialogues are permuted, and the examples of one are neighbours.

    So they share their history in a window. A dialogue may straddle two windows.
    """
    permutation = np.random.default_rng([seed, epoch]).permutation(len(firsts))
    begins, lengths = firsts[permutation], np.diff(firsts, append=count)[permutation]
    # Where a dialogue begins in the order is the sum of the lengths before it.
    shifts = begins - (np.cumsum(lengths) - lengths)
    order: NDArray[np.int64] = np.arange(count) + np.repeat(shifts, lengths)
    return order


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
