"""Splits a window into micro-batches and gives them to ranks: little padding, even work."""

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil
from operator import itemgetter

from data.batching.shared_prefix import sort_by_prefix, tokens_saved
from data.encoding.encode import Example

Examples = list[Example]  # of one micro-batch; may be empty

# What a micro-batch more costs, in padded tokens: as often the weights are read from memory.
# Measured on a CPU (benchmarks/RESULTS.md, Padding of pairs).
OVERHEAD = 112
SWAPS, NEAR = 4, 4  # swaps a rank, and lengths that each example is tried with, at most


@dataclass(frozen=True)
class Limits:
    """What one micro-batch may hold, and how it is run.

    examples, tokens: at most so many, padding counted; a longer example runs alone.
    packed: in one row without padding, else padded to the longest.
    finer: split further where that saves more padding than it costs.
    sharing: what a row's examples begin with alike is run once; `tokens` counts it each time.
    """

    examples: int
    tokens: int | None = None
    packed: bool = False
    finer: bool = False
    sharing: bool = False

    def cost(self, part: Examples) -> int:
        """Return the tokens that one micro-batch runs, padding counted."""
        if not self.packed:
            return padded_tokens(part)
        return packed_tokens(part) - (tokens_saved(part)[0] if self.sharing else 0)


@dataclass(frozen=True)
class Assignment:
    """A window's micro-batches by rank and slot, as many for each rank.

    tokens: what each rank runs, padding counted, and what a row shares once.
    """

    ranks: list[list[Examples]]
    tokens: list[int]


def assign_micro_batches(chosen: list[Example], world_size: int, limits: Limits) -> Assignment:
    """Deal a window's examples out; the same on every rank, and the gradient depends on none of it.

    Micro-batches of like work run at the same time on all ranks, and each rank's sum is about even.
    """
    cost = packed_tokens if limits.packed else padded_tokens
    slots = ceil(len(chosen) / (world_size * limits.examples))
    if limits.tokens:
        least = sum(example.run_tokens for example in chosen)
        slots = max(slots, ceil(least / (world_size * limits.tokens)))
    while True:
        parts = _parts(chosen, slots * world_size, limits)
        if not limits.tokens or all(len(p) < 2 or cost(p) <= limits.tokens for p in parts):
            break
        slots += 1
    dealt = _to_ranks(parts, world_size, limits.cost)
    while limits.finer and not limits.packed and slots * world_size < len(chosen):
        slots *= 2
        finer = _to_ranks(_parts(chosen, slots * world_size, limits), world_size, limits.cost)
        dealt = min(dealt, finer, key=_busiest)
    return _evened(dealt, limits) if limits.packed and world_size > 1 else dealt


def packed_tokens(part: Examples) -> int:
    """Return the tokens of one micro-batch in one row, each example by itself."""
    return sum(example.run_tokens for example in part)


def padded_tokens(part: Examples) -> int:
    """Return the tokens of one micro-batch, padded to the longest on each side."""
    return len(part) * sum(
        max((example.lengths[side] for example in part), default=0) for side in range(2)
    )


def squares(chosen: list[Example], dealt: Assignment, limits: Limits) -> int:
    """Return the sum of the examples' squared lengths, by which attention's work grows."""
    parts = [part for rank in dealt.ranks for part in rank] if limits.sharing else []
    return sum(e.run_tokens**2 for e in chosen) - sum(tokens_saved(part)[1] for part in parts)


def _parts(chosen: list[Example], count: int, limits: Limits) -> list[Examples]:
    return _even(chosen, count, limits) if limits.packed else _alike(chosen, count)


def _even(chosen: list[Example], count: int, limits: Limits) -> list[Examples]:
    """Split examples into parts of even tokens: the longest first, each to the emptiest part.

    In a part those that begin alike lie side by side.
    """
    parts: list[Examples] = [[] for _ in range(count)]
    open_parts = [(0, number) for number in range(count)]
    for example in sorted(chosen, key=lambda e: -e.run_tokens):
        tokens, number = heappop(open_parts)
        parts[number].append(example)
        if len(parts[number]) < limits.examples:
            heappush(open_parts, (tokens + example.run_tokens, number))
    return [sort_by_prefix(part) for part in parts]


def _alike(chosen: list[Example], count: int) -> list[Examples]:
    """Split examples into parts of like size and like lengths, the longest first.

    Each half of them is sorted anew, by the side of the pairs whose padding it cuts most. Of
    dialogues, which have one side, that is one order by length.
    """
    if count == 1:
        return [chosen]
    half = count // 2
    middle = round(half * len(chosen) / count)
    lengths = (lambda e: -max(e.lengths), lambda e: -e.lengths[0], lambda e: -e.lengths[1])
    orders = [sorted(chosen, key=length) for length in lengths]
    halves = min(
        ((order[:middle], order[middle:]) for order in orders),
        key=lambda halves: sum(map(padded_tokens, halves)),
    )
    return _alike(halves[0], half) + _alike(halves[1], count - half)


def _busiest(dealt: Assignment) -> int:
    """Return what the busiest rank takes, in padded tokens."""
    return max(dealt.tokens) + OVERHEAD * len(dealt.ranks[0])


def _evened(dealt: Assignment, limits: Limits) -> Assignment:
    """Swap examples between the busiest and the idlest rank for as long as that helps.

    No slot's largest micro-batch grows: under ZeRO-2 and -3 the ranks wait for it, slot by slot.
    """
    ranks, loads = [[*rank] for rank in dealt.ranks], [*dealt.tokens]
    costs = [[limits.cost(part) for part in rank] for rank in ranks]
    most = [max(slot) for slot in zip(*costs, strict=True)]
    for _ in range(SWAPS * len(ranks)):
        busy, idle = (side(range(len(loads)), key=loads.__getitem__) for side in (max, min))
        rooms = [a - b for a, b in zip(most, costs[idle], strict=True)]
        places = _best_swap(ranks[busy], ranks[idle], (loads[busy] - loads[idle]) / 2, rooms)
        if places is None:
            break
        (slot, n), (other, m) = places
        mine, theirs = [*ranks[busy][slot]], [*ranks[idle][other]]
        mine[n], theirs[m] = theirs[m], mine[n]
        moved = [(busy, slot, sort_by_prefix(mine)), (idle, other, sort_by_prefix(theirs))]
        found = [limits.cost(part) for _, _, part in moved]
        after = [loads[r] - costs[r][at] + c for (r, at, _), c in zip(moved, found, strict=True)]
        if (
            max(after) >= loads[busy]
            or found[1] > most[other]
            or (limits.tokens and len(theirs) > 1 and packed_tokens(theirs) > limits.tokens)
        ):
            break
        for (rank, at, part), cost, load in zip(moved, found, after, strict=True):
            ranks[rank][at], costs[rank][at], loads[rank] = part, cost, load
    return Assignment(ranks, loads)


def _best_swap(
    busy: list[Examples], idle: list[Examples], wanted: float, rooms: list[int]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return the places of two examples whose lengths differ by what is wanted, as nearly as any.

    A place is a micro-batch's number and the example's in it. rooms: what each of the idle rank's
    micro-batches may grow by.
    """
    there = sorted(
        (example.run_tokens, slot, n)
        for slot, part in enumerate(idle)
        for n, example in enumerate(part)
    )
    swaps = [
        (abs(example.run_tokens - tokens - wanted), (slot, n), (other, m))
        for slot, part in enumerate(busy)
        for n, example in enumerate(part)
        for at in [bisect(there, (example.run_tokens - wanted, 0, 0))]
        for tokens, other, m in there[max(at - NEAR, 0) : at + NEAR]
        if 0 < example.run_tokens - tokens <= rooms[other]
    ]
    return min(swaps)[1:] if swaps else None


def _to_ranks(
    parts: list[Examples], world_size: int, cost: Callable[[Examples], int]
) -> Assignment:
    """Give each slot's parts to the ranks, the largest to the one with the least so far."""
    ranks: list[list[Examples]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    sized = sorted(((cost(part), part) for part in parts), key=itemgetter(0), reverse=True)
    for begin in range(0, len(sized), world_size):
        waiting = sorted(range(world_size), key=loads.__getitem__)
        for rank, (tokens, part) in zip(waiting, sized[begin : begin + world_size], strict=True):
            ranks[rank].append(part)
            loads[rank] += tokens
    return Assignment(ranks, loads)
