"""Draws a histogram of lengths, as lines of text and as a PNG."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

BAR_CHARACTERS = 40  # in the longest bar of the text
BARS_PER_DOUBLING = 4  # in the PNG


def quantile(lengths: Mapping[int, int], share: float) -> int:
    """Return the smallest length that this share of all lengths does not exceed; 0 without lengths.

    >>> quantile({10: 1, 20: 2, 90: 1}, 0.5)
    20
    """
    ordered = sorted(lengths.items())
    target = share * sum(lengths.values())
    sums = accumulate(count for _, count in ordered)
    reached = (length for (length, _), sum_ in zip(ordered, sums, strict=True) if sum_ >= target)
    return next(reached, 0)


def doublings(lengths: Mapping[int, int]) -> dict[int, int]:
    """Return a map of each power of two to the number of lengths from it up to the next power.

    >>> doublings({5: 2, 7: 1, 20: 1})
    {4: 3, 8: 0, 16: 1}
    """
    bins: Counter[int] = Counter()
    for length, count in lengths.items():
        bins[length.bit_length()] += count
    shown = range(min(bins, default=0), max(bins, default=-1) + 1)
    return {(1 << bits) // 2: bins[bits] for bits in shown}


def as_text(bins: Mapping[int, int]) -> list[str]:
    """Return a line of text with a bar for each power of two.

    >>> as_text({1: 2, 2: 1})
    ['1 - 1  2 ########################################', '2 - 3  1 ####################']
    """
    spans = [f"{low:,} - {max(2 * low - 1, 0):,}" for low in bins]
    wide, most = max(map(len, spans), default=0), max(bins.values(), default=1)
    figures = len(f"{most:,}")
    return [
        f"{span:>{wide}}  {count:>{figures},} {'#' * -(-BAR_CHARACTERS * count // most)}".rstrip()
        for span, count in zip(spans, bins.values(), strict=True)
    ]


def write_picture(
    lengths: Mapping[int, int], unit: str, title: str, limits: Sequence[int], file: Path
) -> None:
    """Write a PNG with a logarithmic axis of lengths and a line at each limit."""
    from matplotlib.figure import Figure  # a slow import

    shown = {max(length, 1): count for length, count in lengths.items()}
    longest = max(shown)
    first, last = min(shown).bit_length() - 1, longest.bit_length()
    edges = [
        2 ** (step / BARS_PER_DOUBLING)
        for step in range(BARS_PER_DOUBLING * first, BARS_PER_DOUBLING * last + 1)
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.hist([*shown], edges, weights=[*shown.values()], color="#4c78a8")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    for limit in limits:
        if limit <= longest:
            axes.axvline(limit, color="#888888", linewidth=0.8, linestyle="--")
    axes.set(xlabel=f"{unit} (logarithmic)", ylabel="examples", title=title)
    figure.savefig(file, format="png", dpi=120)
