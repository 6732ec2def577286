"""Reads runs' logs for plotting: metrics.jsonl, or trainer_state.json if that is missing."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from data.errors import UserError

LOG, STATE, SETTINGS = "metrics.jsonl", "trainer_state.json", "training_config.yaml"
Entry = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class PriorRun:
    """The state of a run before this launch; for a new run, step is 0.

    step: optimizer steps done. progress: the content of the checkpoint's progress.json. log: the
    metrics.jsonl of the run that wrote the checkpoint.
    """

    step: int
    progress: dict[str, Any]
    log: Path | None = None


@dataclass(frozen=True)
class Series:
    """One metric in a panel; noisy metrics are smoothed."""

    key: str
    label: str
    dashed: bool = False
    noisy: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot: title, unit, metrics, and whether the y axis starts at 0."""

    title: str
    unit: str
    series: tuple[Series, ...]
    from_zero: bool = True


PANELS = (
    Panel(
        "Loss",
        "nats per supervised token",
        (Series("loss", "training", noisy=True), Series("eval_loss", "evaluation", dashed=True)),
        from_zero=False,
    ),
    Panel("Learning rate", "", (Series("learning_rate", "learning rate"),)),
    Panel("Gradient norm", "before clipping", (Series("grad_norm", "gradient norm", noisy=True),)),
    Panel(
        "Speed",
        "tokens/s",
        (
            Series("tokens_per_second", "all tokens", noisy=True),
            Series("supervised_tokens_per_second", "supervised", dashed=True, noisy=True),
        ),
    ),
    Panel("Peak memory", "GiB", (Series("peak_memory_gib", "peak memory"),)),
)
KEYS = [series.key for panel in PANELS for series in panel.series]
# Choices for the x axis. The log of another trainer may hold only steps.
AXES = {"step": "step", "supervised_tokens": "supervised tokens", "seconds": "hours"}


@dataclass(frozen=True)
class Run:
    """One run's log entries, ordered by step, and its settings."""

    name: str
    folder: Path
    entries: list[Entry]
    resumed: list[int] = field(default_factory=list)  # steps after which it resumed
    settings: dict[str, Any] = field(default_factory=dict)

    def points(self, key: str, axis: str = "step") -> Points:
        """Return a key's logged values as (x, y) along an axis, without null values."""
        entries = [entry for entry in self.entries if entry.get(key) is not None]
        xs = self.along(axis, [entry["step"] for entry in entries])
        return [(x, float(entry[key])) for x, entry in zip(xs, entries, strict=True)]

    def along(self, axis: str, steps: Sequence[int]) -> list[float]:
        """Convert steps to an axis' unit, by linear interpolation between log entries."""
        if axis == "step":
            return [float(step) for step in steps]
        scale = 3600 if axis == "seconds" else 1
        known = [entry for entry in self.entries if entry.get(axis) is not None]
        values = [entry[axis] / scale for entry in known]
        return [float(x) for x in np.interp(steps, [entry["step"] for entry in known], values)]

    def last(self, key: str) -> float | None:
        """Return a key's last logged value."""
        values = [entry[key] for entry in self.entries if entry.get(key) is not None]
        return values[-1] if values else None

    def lowest(self, key: str) -> float | None:
        """Return a key's lowest logged value."""
        return min((value for _, value in self.points(key)), default=None)

    def highest(self, key: str) -> float | None:
        """Return a key's highest logged value."""
        return max((value for _, value in self.points(key)), default=None)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Return the runs in these output folders, each with a distinct name.

    Raises UserError if a folder has no log, or if its log is corrupt or has no metrics yet.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    names = [path.resolve().name for path in paths]
    if len({*names}) < len(names):
        names = [str(path) for path in paths]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"found the same run twice: {' '.join(folders)}; expected each run once.")
    return [_read_run(path, name) for path, name in zip(paths, names, strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not folder.exists():
        raise UserError(f"{folder}: no such folder. Give the --output_dir of a run.")
    if not folder.is_dir():
        raise UserError(f"{folder}: found a file; expected the folder of a run.")
    file = folder / LOG if (folder / LOG).is_file() else folder / STATE
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"{folder}: found neither {LOG} nor {STATE}; expected the --output_dir of a run."
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}.") from None
    entries, resumed = _merge_resumed([*(_lines if file.name == LOG else _history)(text, file)])
    if not any(entry.get(key) is not None for entry in entries for key in KEYS):
        raise UserError(f"{file}: found no metrics yet; expected at least one entry with a loss.")
    return Run(name, folder, entries, resumed, _settings(folder / SETTINGS))


def _lines(text: str, file: Path) -> Iterator[Entry]:
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            loaded = json.loads(line)
        except ValueError:
            if number == len(lines):
                return  # The run is writing it, or was killed while writing.
            raise UserError(
                f"{file}: line {number} is not valid JSON. Remove the line to plot the rest."
            ) from None
        yield _checked(loaded, f"{file}: line {number}")


def _history(text: str, file: Path) -> Iterator[Entry]:
    try:
        loaded = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}.") from None
    history = loaded.get("log_history") if isinstance(loaded, dict) else None
    if not isinstance(history, list):
        raise UserError(f"{file}: found no log_history; expected a list of log entries.")
    for number, entry in enumerate(history, start=1):
        yield _checked(entry, f"{file}: log_history, entry {number}")


def _checked(entry: Any, where: str) -> Entry:
    """Return the entry's keys that the plots use; a non-finite number becomes None."""
    step = entry.get("step") if isinstance(entry, dict) else None
    if not _is_number(step) or not math.isfinite(step):
        raise UserError(
            f"{where}: found no step; expected an object with a step. Remove the entry."
        )
    checked: Entry = {"step": int(step)}
    for key in (*KEYS, "epoch", "supervised_tokens", "seconds", "resumed_from"):
        value = entry.get(key)
        if value is not None and not _is_number(value):
            raise UserError(f"{where}: {key}: found {value!r}; expected a number.")
        if key in entry:
            checked[key] = value if value is not None and math.isfinite(value) else None
    return checked


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _merge_resumed(entries: list[Entry]) -> tuple[list[Entry], list[int]]:
    """Return a resumed run's entries in one sequence, and the steps after which it resumed.

    If the step decreases, the entries from that step on occur twice; the later ones are kept.
    """
    merged: list[Entry] = []
    resumed: list[int] = []
    for entry in entries:
        step = entry["step"]
        if merged and step < merged[-1]["step"]:
            merged = [old for old in merged if old["step"] < step]
            resumed.append(merged[-1]["step"] if merged else 0)
        elif entry.get("resumed_from") is not None:
            resumed.append(int(entry["resumed_from"]))
        merged.append(entry)
    return merged, sorted({*resumed} - {0})


def _settings(file: Path) -> dict[str, Any]:
    """Return the run's settings; empty if unreadable, since curves do not need them."""
    try:
        loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ between the runs, with one value per run."""
    if not all(run.settings for run in runs):
        return {}
    names = {name: None for run in runs for name in run.settings if name != "output_dir"}
    values = {name: [_as_text(run.settings.get(name)) for run in runs] for name in names}
    return {
        name: words for name, words in values.items() if any(a != b for a, b in pairwise(words))
    }


def _as_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
