"""Finds the prefixes that neighbours of a row share, such as a system prompt or earlier turns."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from data.encoding.encode import Example

MIN_PREFIX_TOKENS = 16  # sharing a shorter prefix saves less than it costs


def sort_by_prefix(examples: Sequence[Example]) -> list[Example]:
    """Return the examples sorted by computed tokens.

    Neighbours then share the longest prefixes, and an example that continues another follows it.
    """
    return sorted(examples, key=_computed)


def shared_prefixes(examples: Sequence[Example]) -> list[int]:
    """Return for each example how many tokens it shares with the example before it in the row.

    The row contains only the other tokens. The shared tokens are those of the example before it,
    which may share them, too:

        examples            row                      shared
        P P P a a           P P P a a                0
        P P P a a b b                 b b            5
        P P P c c                         c c        3

    Invariant: in a sorted row, each prefix is computed once, however deeply prefixes are nested.
    A shared token may predict a supervised token of several examples, because its hidden state
    depends on the prefix alone.

    >>> a, b, c = [
    ...     Example(name, [*range(20), *own, 0], [-100] * (20 + len(own)) + [0], 1)
    ...     for name, own in (("a", [30]), ("b", [30, 31]), ("c", [40]))
    ... ]
    >>> shared_prefixes([a, b, c])
    [0, 21, 20]
    """
    rows = [_computed(example) for example in examples]
    links = [_common_prefix(one, other) for one, other in pairwise(rows)]
    return [0, *(n if n >= MIN_PREFIX_TOKENS else 0 for n in links)][: len(rows)]


# The segments of a row: the number of tokens that a segment shares with the one before it, and the
# number of its own tokens, which follow them. Only the own tokens are in the row.
Segments = Sequence[tuple[int, int]]


def row_segments(examples: Sequence[Example], shared: Sequence[int]) -> Segments:
    """Return the segments of a row; attention is computed once for each segment.

    An example that shares all tokens of the segment before it continues this segment. So the
    examples of one dialogue's answers are one segment if the template does not rewrite earlier
    turns.

    >>> a, b, c = (Example("", ids, ids, 2) for ids in ([1, 2, 3], [1, 2, 4, 5], [1, 6, 7]))
    >>> row_segments([a, b, c], [0, 2, 1])
    [(0, 3), (1, 1)]
    """
    segments: list[tuple[int, int]] = []
    for example, common in zip(examples, shared, strict=True):
        own = example.run_tokens - common
        if segments and common == sum(segments[-1]):
            before, length = segments.pop()
            segments.append((before, length + own))
        elif own:
            segments.append((common, own))
    return segments


def tokens_saved(shared: Iterable[int]) -> tuple[int, int]:
    """Return the tokens that sharing saves, and the sum of the squared lengths that it saves."""
    lengths = [*shared]
    return sum(lengths), sum(n * n for n in lengths)


def _computed(example: Example) -> list[int]:
    return example.input_ids[: example.lengths[0]]


def _common_prefix(one: list[int], other: list[int]) -> int:
    """Return the length of the common prefix of two lists, found by binary search.

    Python compares slices faster than single items.
    """
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
