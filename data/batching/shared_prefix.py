"""Finds what the dialogues of a row begin with alike, like a system prompt: it is run once."""

from collections.abc import Sequence
from itertools import pairwise

from data.encoding.encode import Example

# Tokens; fewer are not worth the cut.
MIN_PREFIX_TOKENS = 16


def sort_by_prefix(examples: Sequence[Example]) -> list[Example]:
    """Return the examples in an order in which those that begin alike are neighbours."""
    return sorted(examples, key=lambda example: example.input_ids)


def prefix_groups(examples: Sequence[Example]) -> list[tuple[int, list[Example]]]:
    """Return neighbours that begin alike as groups, each with how many tokens all of it share.

    None of a group learns from these: the state of a token that predicts a supervised one is each
    dialogue's own, where the loss finds it. Neighbours become one group, those first that share
    most, unless they would share more apart.

    >>> a, b, c = [
    ...     Example(name, [*range(20), token, 0], [-100] * 20 + [token, 0], 2)
    ...     for name, token in (("a", 20), ("b", 30), ("c", 40))
    ... ]
    >>> c.input_ids[0] = 7
    >>> [(shared, len(group)) for shared, group in prefix_groups([a, b, c])]
    [(19, 2), (0, 1)]
    """
    links = [
        min(
            _common(one.input_ids, other.input_ids),
            one.unsupervised_prefix,
            other.unsupervised_prefix,
        )
        for one, other in pairwise(examples)
    ]
    # Of a group: where the one that ends here begins, where the one that begins here ends.
    first, behind = [*range(len(examples))], [*range(1, len(examples) + 1)]
    shared = [0] * len(examples)
    for last in sorted(range(len(links)), key=lambda n: -links[n]):
        left, right, link = first[last], last + 1, links[last]
        end = behind[right]
        apart = shared[left] * (last - left) + shared[right] * (end - right - 1)
        if link >= MIN_PREFIX_TOKENS and link * (end - left - 1) >= apart:
            shared[left], behind[left], first[end - 1] = link, end, left
    groups, begin = [], 0
    while begin < len(examples):
        groups.append((shared[begin], [*examples[begin : behind[begin]]]))
        begin = behind[begin]
    return groups


def tokens_saved(examples: Sequence[Example]) -> tuple[int, int]:
    """Return how many tokens of a row are not run once more, and the sum of their squares."""
    groups = [(shared, len(group) - 1) for shared, group in prefix_groups(examples)]
    return sum(n * more for n, more in groups), sum(n * n * more for n, more in groups)


def _common(one: list[int], other: list[int]) -> int:
    """Return how many ids two lists begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halves, since lists are compared faster than their ids one by one
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
