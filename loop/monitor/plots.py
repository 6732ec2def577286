"""Plots training curves as a PNG (matplotlib) and as a self-contained HTML page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from loop.config.parser import Folder, flag, parse
from loop.monitor.formatting import duration
from loop.monitor.history import (
    AXES,
    KEYS,
    PANELS,
    Panel,
    Points,
    Run,
    Series,
    differences,
    read_runs,
)

TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("report.html", "report.js"))
CURVES = "training_curves"
# One colour per run. Used in this order, they are distinguishable with colour blindness.
LIGHT = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
DARK = ("#3987e5", "#d95926", "#199e70", "#c98500", "#d55181", "#4fae4f", "#9085e9", "#e66767")
INK, GREY, LINES = "#1f1f1e", "#6b6a66", "#e4e3df"
DASHES = (0, (4, 2))
MARKED_BELOW, SMOOTHED_FROM = 30, 60  # points of a curve


def draw_at_end(folder: Path) -> None:
    """Plot a finished or stopped run; an error is printed as a note, not raised."""
    try:
        write_png(read_runs([str(folder)]), folder / f"{CURVES}.png")
    except Exception as error:
        print(f"note: {CURVES}.png was not drawn: {type(error).__name__}: {error}")


def drawn(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels that have data in at least one run."""
    return [
        panel
        for panel in PANELS
        if any(run.points(series.key) for run in runs for series in panel.series)
    ]


def write_png(runs: Sequence[Run], file: Path) -> None:
    """Write the runs' curves as a PNG, atomically."""
    partial = file.with_name(f"{file.name}.partial")
    draw(runs).savefig(partial, format="png")
    partial.replace(file)


def draw(runs: Sequence[Run]) -> Any:
    """Return a matplotlib Figure: the loss on top, the other panels below in two columns."""
    # Imported here, since it takes a second. pyplot is not used, since it has global state.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = drawn(runs)
    rows = 1 + len(panels) // 2
    style: dict[Any, Any] = {
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": LINES,
        "axes.labelcolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    with rc_context(style):
        figure = Figure(figsize=(9, 3.0 + 2.0 * (rows - 1)), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, 2, height_ratios=[1.5, *[1] * (rows - 1)])
        for number, panel in enumerate(panels):
            row, column = divmod(number + 1, 2)
            fills_row = number == 0 or (number == len(panels) - 1 and column == 0)
            cell = grid[row, :] if fills_row else grid[row, column]
            _draw(figure.add_subplot(cell), panel, runs)
        figure.suptitle(_title(runs), fontsize=11, x=0.01, ha="left", fontweight="bold")
        if len(runs) > 1:
            lines = [figure.axes[0].plot([], [], color=color)[0] for color in LIGHT[: len(runs)]]
            names = [run.name for run in runs]
            figure.legend(
                lines, names, loc="outside upper right", ncols=min(len(runs), 4), frameon=False
            )
    return figure


def _title(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    run = runs[0]
    tokens, seconds = run.last("supervised_tokens"), run.last("seconds")
    words = [run.name, f"{run.entries[-1]['step']:,} steps"]
    words += [f"{tokens:,.0f} supervised tokens"] if tokens else []
    words += [duration(seconds)] if seconds else []
    return "  ·  ".join(words)


def _draw(axes: Any, panel: Panel, runs: Sequence[Run]) -> None:
    """Draw one panel, with one colour per run."""
    shown = [s for s in panel.series if any(run.points(s.key) for run in runs)]
    for run, color in zip(runs, LIGHT, strict=False):
        for series in shown:
            points = run.points(series.key)
            if points:
                _line(axes, points, color, series)
        for step in run.resumed:
            axes.axvline(step, color=color, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    unit = f"  ({panel.unit})" if panel.unit else ""
    axes.set_title(f"{panel.title}{unit}", loc="left", fontsize=9.5)
    axes.grid(axis="y", color=LINES, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=8.5)
    axes.locator_params(axis="x", integer=True)
    axes.locator_params(axis="y", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(_brief)
    axes.margins(x=0.015, y=0.08)
    axes.set_xlabel("step", fontsize=8.5, loc="right", labelpad=1)
    if panel.from_zero:
        axes.set_ylim(0, 1.08 * axes.dataLim.ymax or 1)
    if len(shown) > 1:
        color = LIGHT[0] if len(runs) == 1 else GREY
        styles = [DASHES if series.dashed else "-" for series in shown]
        lines = [axes.plot([], [], color=color, linestyle=style)[0] for style in styles]
        axes.legend(
            lines,
            [series.label for series in shown],
            loc="lower right",
            bbox_to_anchor=(1, 0.98),
            borderpad=0.2,
            ncols=2,
            frameon=False,
            fontsize=8.5,
            handlelength=2.6,
        )


def _brief(value: float, _: int) -> str:
    if 0 < abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _line(axes: Any, points: Points, color: str, series: Series) -> None:
    steps, values = [x for x, _ in points], [y for _, y in points]
    style: dict[str, Any] = {"color": color, "linewidth": 1.6, "zorder": 3}
    style |= {"linestyle": DASHES} if series.dashed else {}
    if len(points) < MARKED_BELOW:
        style |= {"marker": ".", "markersize": 5}
    elif len(points) >= SMOOTHED_FROM and series.noisy:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3, zorder=2)
        values = running_mean(values)
    axes.plot(steps, values, **style)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the running mean over a window of 1/30 of the values on each side.

    Near both ends, a straight line fitted to the outermost window replaces the mean.
    """
    reach = max(1, len(values) // 30)
    span = 2 * reach + 1
    means = np.convolve(values, np.full(span, 1 / span), mode="valid")
    xs = np.arange(span)
    first = np.polyval(np.polyfit(xs, values[:span], 1), xs)[:reach]
    last = np.polyval(np.polyfit(xs, values[-span:], 1), xs)[-reach:]
    return [float(mean) for mean in (*first, *means, *last)]


def page(runs: Sequence[Run]) -> str:
    """Return the runs as one HTML page that contains its styles, script and data."""
    axes = {
        axis: label
        for axis, label in AXES.items()
        if all(run.last(axis) is not None for run in runs)
    }
    panels = [
        {
            "title": panel.title,
            "unit": panel.unit,
            "fromZero": panel.from_zero,
            "series": [
                {"key": s.key, "label": s.label, "dashed": s.dashed, "noisy": s.noisy}
                for s in panel.series
                if any(run.points(s.key) for run in runs)
            ],
        }
        for panel in drawn(runs)
    ]
    data = {
        "axes": axes,
        "panels": panels,
        "colors": {"light": LIGHT, "dark": DARK},
        "runs": [_run_data(run, [*axes]) for run in runs],
        "differences": differences(runs),
    }
    # "<" is escaped: HTML interprets "</script" and "<!--" inside a script element.
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    title = escape(", ".join(run.name for run in runs))
    head, tail = TEMPLATE.read_text(encoding="utf-8").split("@DATA")
    script = SCRIPT.read_text(encoding="utf-8")
    return head.replace("@TITLE", title) + embedded + tail.replace("@SCRIPT", script)


def _run_data(run: Run, axes: Sequence[str]) -> dict[str, Any]:
    facts = {
        "last loss": _rounded(run.last("loss")),
        "lowest loss": _rounded(run.lowest("loss")),
        "lowest eval loss": _rounded(run.lowest("eval_loss")),
        "steps": f"{run.entries[-1]['step']:,}",
        "supervised tokens": _rounded(run.last("supervised_tokens")),
        "time": duration(run.last("seconds") or 0) if run.last("seconds") else None,
        "peak memory, GiB": _rounded(run.highest("peak_memory_gib")),
    }
    points = {key: run.points(key) for key in KEYS}
    steps = {key: [int(x) for x, _ in found] for key, found in points.items()}
    return {
        "name": run.name,
        "facts": facts,
        "resumed": {axis: run.along(axis, run.resumed) for axis in axes},
        "curves": {
            key: {
                "value": [value for _, value in found],
                **{axis: run.along(axis, steps[key]) for axis in axes},
            }
            for key, found in points.items()
            if found
        },
    }


def _rounded(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def write_page(runs: Sequence[Run], file: Path) -> None:
    """Write the page; raises UserError if it cannot be written."""
    try:
        file.write_text(page(runs), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}.") from None


@dataclass(frozen=True)
class PlotConfig:
    """The runs to draw and the output files."""

    runs: tuple[Folder, ...] = flag(
        (), "output folders of runs; without --runs, they come before all flags", "plot"
    )
    out: str | None = flag(
        None,
        "output path without .png and .html; none: training_curves in the run's folder; for "
        "several runs: comparison in the current folder",
        "plot",
    )


def main(argv: Sequence[str]) -> None:
    """Plot the runs; raises UserError if a log cannot be read or a file cannot be written."""
    named = [*takewhile(lambda word: not word.startswith("-"), argv)]
    words = [*(["--runs", *named] if named else []), *argv[len(named) :]]
    values = parse(PlotConfig, words, __doc__ or "")
    values.pop("config", None)
    config = PlotConfig(**values)
    if not config.runs:
        raise UserError("found no run; expected output folders, as in: loop plot runs/main_job")
    if len(config.runs) > len(LIGHT):
        raise UserError(
            f"found {len(config.runs)} runs; expected at most {len(LIGHT)}, the number of "
            "distinguishable colours. Draw them in groups."
        )
    runs = read_runs(config.runs)
    default = Path(config.runs[0]).expanduser() / CURVES if len(runs) == 1 else Path("comparison")
    out = Path(config.out).expanduser() if config.out else default
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
