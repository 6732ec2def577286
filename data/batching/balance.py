"""Splits a window into micro-batches with little padding, and assigns even work to the ranks."""

from bisect import bisect
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil

from data.batching.shared_prefix import shared_prefixes, sort_by_prefix, tokens_saved
from data.encoding.encode import Example

# The cost of one more micro-batch in padded tokens, because it reads the weights from memory again.
# Measured on a CPU (benchmarks/RESULTS.md, Padding of pairs).
MICRO_BATCH_COST_TOKENS = 112
MAX_SWAPS_PER_RANK = 4
# Number of shorter candidates for a swap, and number of longer ones, that are tried per example.
SWAP_CANDIDATES = 4


@dataclass(frozen=True)
class ExampleBatch:
    """The examples of one micro-batch before collation; it may be empty.

    tokens: computed tokens, with padding; a shared prefix counts once.
    shared: tokens that each example shares with the one before it; None if nothing is shared.
    """

    examples: list[Example]
    tokens: int
    shared: list[int] | None = None


@dataclass(frozen=True)
class Limits:
    """The maximum size of a micro-batch, and its form.

    examples, tokens: maximum per micro-batch, with padding. An example of more tokens is alone in
    its micro-batch.
    packed: one row without padding; otherwise examples are padded to the longest.
    finer: make smaller micro-batches if that saves more padding than it costs.
    sharing: a shared prefix in a row is computed once; the limit of tokens still counts it for each
    example.
    """

    examples: int
    tokens: int | None = None
    packed: bool = False
    finer: bool = False
    sharing: bool = False

    def batch(self, examples: list[Example]) -> ExampleBatch:
        """Return the micro-batch of these examples, with its cost and its shared prefixes."""
        if not self.packed:
            return ExampleBatch(examples, padded_tokens(examples))
        if not self.sharing:
            return ExampleBatch(examples, packed_tokens(examples))
        shared = shared_prefixes(examples)
        saved, _ = tokens_saved(shared)
        return ExampleBatch(examples, packed_tokens(examples) - saved, shared)

    def allows(self, examples: list[Example]) -> bool:
        """Return whether the examples are within the limit of tokens, or only one."""
        count = packed_tokens if self.packed else padded_tokens
        return not self.tokens or len(examples) < 2 or count(examples) <= self.tokens


@dataclass(frozen=True)
class Assignment:
    """The micro-batches of a window by rank and slot; each rank has the same number of slots."""

    ranks: list[list[ExampleBatch]]

    @property
    def tokens(self) -> list[int]:
        """Computed tokens of each rank, with padding; a shared prefix counts once."""
        return [sum(batch.tokens for batch in rank) for rank in self.ranks]

    @property
    def squared_tokens(self) -> int:
        """The sum of the squared lengths; the work of attention is proportional to it."""
        batches = [batch for rank in self.ranks for batch in rank]
        squares = sum(e.run_tokens**2 for batch in batches for e in batch.examples)
        return squares - sum(tokens_saved(batch.shared or [])[1] for batch in batches)


def assign_micro_batches(chosen: list[Example], world_size: int, limits: Limits) -> Assignment:
    """Assign a window's examples to micro-batches and ranks.

    All ranks compute the same assignment. The window's gradient does not depend on it. The
    micro-batches of one slot run at the same time on all ranks, so they have similar sizes. The
    ranks have about equal sums over all slots.
    """
    slots = ceil(len(chosen) / (world_size * limits.examples))
    if limits.tokens:
        unpadded = sum(example.run_tokens for example in chosen)
        slots = max(slots, ceil(unpadded / (world_size * limits.tokens)))
    while True:
        parts = _parts(chosen, slots * world_size, limits)
        if all(map(limits.allows, parts)):
            break
        slots += 1
    assignment = _to_ranks(parts, world_size, limits)
    while limits.finer and not limits.packed and slots * world_size < len(chosen):
        slots *= 2
        finer = _to_ranks(_parts(chosen, slots * world_size, limits), world_size, limits)
        assignment = min(assignment, finer, key=_busiest_cost)
    return _evened(assignment, limits) if limits.packed and world_size > 1 else assignment


def packed_tokens(examples: list[Example]) -> int:
    """Return the tokens of one micro-batch in one row; a shared prefix counts for each example."""
    return sum(example.run_tokens for example in examples)


def padded_tokens(examples: list[Example]) -> int:
    """Return the tokens of one micro-batch whose sides are padded to their longest example."""
    return len(examples) * sum(
        max((example.lengths[side] for example in examples), default=0) for side in range(2)
    )


def _parts(chosen: list[Example], count: int, limits: Limits) -> list[list[Example]]:
    return _even_parts(chosen, count, limits) if limits.packed else _similar_parts(chosen, count)


def _even_parts(chosen: list[Example], count: int, limits: Limits) -> list[list[Example]]:
    """Split examples into parts with about equal tokens.

    Dialogues are assigned from the longest to the shortest, each to the part with the fewest
    tokens. The examples of one dialogue's answers share their history, so they stay together; those
    beyond the limits of the part are assigned next. Within a part, examples with a common prefix
    are neighbours.
    """
    parts: list[list[Example]] = [[] for _ in range(count)]
    open_parts = [(0, number) for number in range(count)]
    waiting = [(-limits.batch(d).tokens, n, d) for n, d in enumerate(_dialogues(chosen, limits))]
    heapify(waiting)
    while waiting:
        _, order, dialogue = heappop(waiting)
        tokens, number = heappop(open_parts)
        part = parts[number]
        fitting = min(limits.examples - len(part), len(dialogue))
        while fitting > 1 and not limits.allows(part + dialogue[:fitting]):
            fitting -= 1
        now, later = dialogue[:fitting], dialogue[fitting:]
        part += now
        if later:
            heappush(waiting, (-limits.batch(later).tokens, order, later))
        if len(part) < limits.examples:
            heappush(open_parts, (tokens + limits.batch(now).tokens, number))
    return [sort_by_prefix(part) for part in parts]


def _dialogues(chosen: list[Example], limits: Limits) -> list[list[Example]]:
    """Return the examples by dialogue; only examples of one dialogue's answers are together."""
    found: dict[tuple[int, int], list[Example]] = {}
    for n, example in enumerate(chosen):
        together = limits.sharing and example.turn is not None
        found.setdefault((example.record, -1) if together else (0, n), []).append(example)
    return [*found.values()]


def _similar_parts(chosen: list[Example], count: int) -> list[list[Example]]:
    """Split examples into parts of similar size and similar lengths, the longest first.

    The examples are sorted and halved, recursively. Pairs are sorted by source, by target or by
    their longer side, whichever saves most padding. A dialogue has only one length.
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
    return _similar_parts(halves[0], half) + _similar_parts(halves[1], count - half)


def _busiest_cost(assignment: Assignment) -> int:
    """Return the cost of the busiest rank in padded tokens."""
    return max(assignment.tokens) + MICRO_BATCH_COST_TOKENS * len(assignment.ranks[0])


def _evened(assignment: Assignment, limits: Limits) -> Assignment:
    """Swap examples between the busiest and the idlest rank while that lowers the maximum.

                  slot 0     slot 1
        busiest   [a  b]     [c  D]      D moves to the idlest rank, e to the busiest. D is longer
        idlest    [e  f]     [g  h]      by about half of the difference between both ranks.

    Invariant: the idlest rank's micro-batch does not become larger than the largest of its slot.
    Under ZeRO-2 and ZeRO-3, all ranks wait for the largest micro-batch of each slot.
    """
    ranks = [[*rank] for rank in assignment.ranks]
    largest = [max(batch.tokens for batch in slot) for slot in zip(*ranks, strict=True)]
    for _ in range(MAX_SWAPS_PER_RANK * len(ranks)):
        loads = Assignment(ranks).tokens
        busy, idle = loads.index(max(loads)), loads.index(min(loads))
        if busy == idle:
            break
        places = _best_swap(ranks[busy], ranks[idle], (loads[busy] - loads[idle]) / 2, largest)
        if places is None:
            break
        (busy_slot, n), (idle_slot, m) = places
        old = ranks[busy][busy_slot], ranks[idle][idle_slot]
        longer, shorter = ([*batch.examples] for batch in old)
        longer[n], shorter[m] = shorter[m], longer[n]
        new = [limits.batch(sort_by_prefix(examples)) for examples in (longer, shorter)]
        busy_load = loads[busy] - old[0].tokens + new[0].tokens
        idle_load = loads[idle] - old[1].tokens + new[1].tokens
        lowers_maximum = max(busy_load, idle_load) < loads[busy]
        if not (lowers_maximum and new[1].tokens <= largest[idle_slot] and limits.allows(shorter)):
            break
        ranks[busy][busy_slot], ranks[idle][idle_slot] = new
    return Assignment(ranks)


Place = tuple[int, int]  # the slot of a micro-batch, and the index of an example in it


def _best_swap(
    busy: list[ExampleBatch], idle: list[ExampleBatch], wanted: float, largest: list[int]
) -> tuple[Place, Place] | None:
    """Return the places of two examples: one of the busy rank, and a shorter one of the idle rank.

    wanted: the difference of their lengths, in tokens; the closest pair is returned.
    largest: maximum tokens of the idle rank's micro-batches, by slot. With shared prefixes, the
    caller must check it.
    """
    candidates = sorted(
        (example.run_tokens, slot, m)
        for slot, batch in enumerate(idle)
        for m, example in enumerate(batch.examples)
    )
    room = [most - batch.tokens for most, batch in zip(largest, idle, strict=True)]
    swaps = [
        (abs(example.run_tokens - tokens - wanted), (busy_slot, n), (idle_slot, m))
        for busy_slot, batch in enumerate(busy)
        for n, example in enumerate(batch.examples)
        for at in [bisect(candidates, (example.run_tokens - wanted, 0, 0))]
        for tokens, idle_slot, m in candidates[max(at - SWAP_CANDIDATES, 0) : at + SWAP_CANDIDATES]
        if 0 < example.run_tokens - tokens <= room[idle_slot]
    ]
    return min(swaps)[1:] if swaps else None


def _to_ranks(parts: list[list[Example]], world_size: int, limits: Limits) -> Assignment:
    """Assign the parts slot by slot; the largest part of a slot goes to the idlest rank."""
    ranks: list[list[ExampleBatch]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    batches = sorted(map(limits.batch, parts), key=lambda batch: -batch.tokens)
    for begin in range(0, len(batches), world_size):
        least_loaded = sorted(range(world_size), key=loads.__getitem__)
        for rank, batch in zip(least_loaded, batches[begin : begin + world_size], strict=True):
            ranks[rank].append(batch)
            loads[rank] += batch.tokens
    return Assignment(ranks)
