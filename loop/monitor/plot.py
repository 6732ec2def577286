"""`python -m loop plot RUN [RUN ...]`: a run's curves, or several runs' in one picture.

A RUN is the --output_dir of a run, going on or ended. Written are a PNG and one HTML page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from data.errors import UserError
from loop.config.parser import Folder, flag, parse
from loop.monitor.history import read_runs
from loop.monitor.plots import CURVES, LIGHT, write_page, write_png


@dataclass(frozen=True)
class PlotConfig:
    """What to draw, and where to."""

    runs: tuple[Folder, ...] = flag((), "output folders; the words before any flag, too", "plot")
    out: str | None = flag(
        None,
        "where to write, without .png and .html; none: training_curves in the run's folder, or "
        "comparison here for several",
        "plot",
    )


def main(argv: Sequence[str]) -> None:
    """Draw the runs named; raises UserError where one cannot be read or nothing be written."""
    named = [*takewhile(lambda word: not word.startswith("-"), argv)]
    words = [*(["--runs", *named] if named else []), *argv[len(named) :]]
    values = parse(PlotConfig, words, __doc__ or "")
    values.pop("config", None)
    config = PlotConfig(**values)
    if not config.runs:
        raise UserError("found no run; expected output folders, as in: loop plot runs/main_job")
    if len(config.runs) > len(LIGHT):
        raise UserError(
            f"found {len(config.runs)} runs; expected at most {len(LIGHT)}, which is how many "
            "colours can be told apart. Draw them in groups."
        )
    runs = read_runs(config.runs)
    alone = Path(config.runs[0]).expanduser() / CURVES
    out = Path(config.out).expanduser() if config.out else Path("comparison")
    out = alone if len(runs) == 1 and not config.out else out
    png, html = out.with_name(f"{out.name}.png"), out.with_name(f"{out.name}.html")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_png(runs, png)
    except ImportError as error:
        raise UserError(
            f"{error}; expected matplotlib. Install it: pip install matplotlib"
        ) from None
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}.") from None
    write_page(runs, html)
    print(f"{png}\n{html}")
