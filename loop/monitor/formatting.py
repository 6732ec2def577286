"""Formats text output: losses, sizes, durations, and the doctor's sections, tables and curve."""

import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30
LINE_WIDTH, LABEL_WIDTH, WIDTH = 100, 16, 56  # columns of a line, its label, and a curve
BOLD, GREEN, PLAIN = "\033[1m", "\033[32m", "\033[0m"
YELLOW, CYAN = "\033[33m", "\033[36m"
BARS = " ▁▂▃▄▅▆▇█"


def in_colour() -> bool:
    """Return whether standard output shows colours; FORCE_COLOR and NO_COLOR override."""
    return "FORCE_COLOR" in os.environ or (sys.stdout.isatty() and "NO_COLOR" not in os.environ)


@dataclass(frozen=True)
class Page:
    """Prints sections one by one, so that progress is visible during slow checks."""

    colour: bool

    def section(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a title and its rows (label, text); a text may have several lines."""
        print(f"\n{self.marked(title, BOLD)}")
        for label, text in rows:
            lines = [part for line in text.splitlines() for part in _wrapped(line)]
            for number, line in enumerate(lines):
                print(f"  {label if number == 0 else '':{LABEL_WIDTH}}{line}".rstrip(), flush=True)

    def marked(self, text: str, colour: str) -> str:
        """Return the text in this colour if the page has colours."""
        return f"{colour}{text}{PLAIN}" if self.colour else text


def _wrapped(line: str) -> list[str]:
    if line[:1] in ("", " "):
        return [line]  # Lines of curves, tables and examples are not wrapped.
    return textwrap.wrap(
        line, LINE_WIDTH - LABEL_WIDTH - 2, break_long_words=False, break_on_hyphens=False
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def loss_text(loss: float | None) -> str:
    """Return a loss with four decimals, or "not finite" for None.

    >>> loss_text(1.25), loss_text(None)
    ('1.2500', 'not finite')
    """
    return "not finite" if loss is None else f"{loss:.4f}"


def gib(size: float) -> str:
    """Return bytes in GiB with three decimals; a MiB is 0.001."""
    return f"{size / GIB:.3f}"


def megabytes(size: float) -> str:
    """Return bytes in MB, or in GB from 1 GB on.

    >>> megabytes(5_400_000), megabytes(24_300_000_000)
    ('5.4 MB', '24.3 GB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Return seconds in s, min and s, or h and min.

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
    """Return a bar chart of block characters: one column per value, from 0 to the maximum.

    >>> curve([0.0, 1.0, 2.0, 1.0], width=4, height=2)
    ['   █ ', '  ███']
    """
    columns = range(min(width, len(values)))
    last = max(1, len(columns) - 1)
    sampled = [values[round(column * (len(values) - 1) / last)] for column in columns]
    maximum = max(sampled) or 1.0
    eighths = [round(8 * height * value / maximum) for value in sampled]
    return [
        " " + "".join(BARS[min(8, max(0, full - 8 * row))] for full in eighths)
        for row in reversed(range(height))
    ]
