"""Groups the dialogues of a row by their shared prefixes, such as a system prompt."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from data.encoding.encode import Example

MIN_PREFIX_TOKENS = 16  # sharing a shorter prefix saves less than it costs


class PrefixGroup(NamedTuple):
    """Examples whose first `shared` tokens are equal and computed once; one example shares 0."""

    shared: int
    examples: list[Example]


class _Span(NamedTuple):
    """The examples `begin` to `end` (exclusive) of a row, with `shared` tokens in common."""

    begin: int
    end: int
    shared: int

    @property
    def saved(self) -> int:
        """Tokens that sharing saves: only the first example computes the prefix."""
        return self.shared * (self.end - self.begin - 1)


def sort_by_prefix(examples: Sequence[Example]) -> list[Example]:
    """Return the examples sorted by token ids, so that common prefixes become neighbours."""
    return sorted(examples, key=lambda example: example.input_ids)


def prefix_groups(examples: Sequence[Example]) -> list[PrefixGroup]:
    """Partition a row into groups of neighbours that share a prefix, in the row's order.

    There is a link between neighbours. Its length is the number of tokens that both may share. The
    links are visited from the longest to the shortest. Each link merges the groups on its two
    sides, unless the merged group saves fewer tokens than the two groups:

        examples    a    b    c    d    e
        links         90   90   20   80
        groups      [a    b    c]  [d    e]     c-d: merged 4 * 20 saved, separate 2 * 90 + 80

    Invariant: a group shares the length of its shortest link, which was merged last.

    A shared token predicts no supervised token. A token that predicts one is computed for each
    dialogue, because the loss reads its state.

    >>> a, b, c = [
    ...     Example(name, [*range(20), token, 0], [-100] * 20 + [token, 0], 2)
    ...     for name, token in (("a", 20), ("b", 30), ("c", 40))
    ... ]
    >>> c.input_ids[0] = 7
    >>> [(group.shared, len(group.examples)) for group in prefix_groups([a, b, c])]
    [(19, 2), (0, 1)]
    """
    links = [
        min(
            _common_prefix(one.input_ids, other.input_ids),
            one.unsupervised_prefix,
            other.unsupervised_prefix,
        )
        for one, other in pairwise(examples)
    ]
    # The span of each example. Only the entries of the first and the last example of a span are
    # updated, and only these are read.
    spans = [_Span(n, n + 1, 0) for n in range(len(examples))]
    for n in sorted(range(len(links)), key=lambda n: -links[n]):
        left, right = spans[n], spans[n + 1]
        merged = _Span(left.begin, right.end, links[n])
        if merged.shared >= MIN_PREFIX_TOKENS and merged.saved >= left.saved + right.saved:
            spans[merged.begin] = spans[merged.end - 1] = merged
    groups, begin = [], 0
    while begin < len(examples):
        _, end, shared = spans[begin]
        groups.append(PrefixGroup(shared, [*examples[begin:end]]))
        begin = end
    return groups


def tokens_saved(groups: Iterable[PrefixGroup]) -> tuple[int, int]:
    """Return the tokens that sharing saves, and the sum of the squared lengths that it saves."""
    repeats = [(shared, len(examples) - 1) for shared, examples in groups]
    return sum(n * count for n, count in repeats), sum(n * n * count for n, count in repeats)


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
