"""How the doctor's report looks: sections of aligned rows, tables, a small curve."""

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
WIDE, NAME, WIDTH = 100, 16, 56  # columns of a line, of its first word, and of a curve
BOLD, GREEN, PLAIN = "\033[1m", "\033[32m", "\033[0m"
BARS = " ▁▂▃▄▅▆▇█"


def in_colour() -> bool:
    """Whether standard output is a terminal that shows colours."""
    return "FORCE_COLOR" in os.environ or (sys.stdout.isatty() and "NO_COLOR" not in os.environ)


@dataclass(frozen=True)
class Page:
    """Prints as it goes, so that what takes long is seen to be at work."""

    colour: bool

    def section(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a title, and each row's name before its text, which may have several lines."""
        print(f"\n{self.marked(title, BOLD)}")
        for name, text in rows:
            lines = [part for line in text.splitlines() for part in _wrapped(line)]
            for number, line in enumerate(lines):
                print(f"  {name if number == 0 else '':{NAME}}{line}".rstrip(), flush=True)

    def marked(self, text: str, colour: str) -> str:
        """Return the text in this colour, where there are colours."""
        return f"{colour}{text}{PLAIN}" if self.colour else text


def _wrapped(line: str) -> list[str]:
    if line[:1] in ("", " "):
        return [line]  # of a picture, a table, an example
    return textwrap.wrap(line, WIDE - NAME - 2, break_long_words=False, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def gib(size: float) -> str:
    """Return bytes as GiB; a MiB is 0.001."""
    return f"{size / GIB:.3f}"


def megabytes(size: float) -> str:
    """Return bytes in the unit that a person would choose.

    >>> megabytes(5_400_000), megabytes(24_300_000_000)
    ('5.4 MB', '24.3 GB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Return seconds as a person says them.

    >>> duration(7.25), duration(190), duration(7_300)
    ('7.2 s', '3 min 10 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def curve(values: Sequence[float], width: int = WIDTH, height: int = 4) -> list[str]:
    """Return lines of blocks: each column a value, from 0 to the greatest, the first to the left.

    >>> curve([0.0, 1.0, 2.0, 1.0], width=4, height=2)
    ['   █ ', '  ███']
    """
    places = range(min(width, len(values)))
    last = max(1, len(places) - 1)
    shown = [values[round(place * (len(values) - 1) / last)] for place in places]
    most = max(shown) or 1.0
    eighths = [round(8 * height * value / most) for value in shown]
    return [
        " " + "".join(BARS[min(8, max(0, full - 8 * row))] for full in eighths)
        for row in reversed(range(height))
    ]
