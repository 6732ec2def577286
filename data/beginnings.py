"""Finds what the dialogues of a row begin with alike, like a system prompt: it is run once."""

from collections.abc import Sequence
from itertools import groupby

from data.encode import IGNORE_INDEX, Example

# Tokens; fewer are not worth the cut.
HEAD = 8


def head(example: Example) -> list[int]:
    """Return what dialogues of one group have in common at least."""
    return example.input_ids[:HEAD]


def begun_alike(examples: Sequence[Example]) -> list[tuple[int, list[Example]]]:
    """Return neighbours that begin alike as groups, each with how many tokens they share.

    >>> a, b, c = [
    ...     Example(name, [*range(9), token, 0], [-100] * 9 + [token, 0], 2)
    ...     for name, token in (("a", 20), ("b", 30), ("c", 40))
    ... ]
    >>> c.input_ids[0] = 7
    >>> [(shared, len(group)) for shared, group in begun_alike([a, b, c])]
    [(8, 2), (0, 1)]
    """
    groups = [[*group] for _, group in groupby(examples, key=head)]
    return [(_shared(group), group) for group in groups]


def spared(examples: Sequence[Example]) -> tuple[int, int]:
    """Return how many tokens of a row are not run once more, and the sum of their squares."""
    groups = [(shared, len(group) - 1) for shared, group in begun_alike(examples)]
    return sum(n * more for n, more in groups), sum(n * n * more for n, more in groups)


def _shared(group: Sequence[Example]) -> int:
    """Return how many tokens all begin with, from which none learns.

    The state of a token that predicts a supervised one is each dialogue's own, so that the loss
    finds it in its place. What the first and the last share in lexicographic order, all do.
    """
    if len(group) < 2:
        return 0
    first, last = (side(group, key=lambda e: e.input_ids).input_ids for side in (min, max))
    pairs = enumerate(zip(first, last, strict=False))
    shared = next((n for n, (a, b) in pairs if a != b), min(len(first), len(last)))
    for example in group:
        shared = min(shared, example.run_tokens - 1)
        learnt = (n for n in range(shared) if example.labels[n + 1] != IGNORE_INDEX)
        shared = next(learnt, shared)
    return shared
