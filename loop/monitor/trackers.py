"""Logs to wandb, TensorBoard and trackio through accelerate's trackers."""

import contextlib
import dataclasses
import functools
import html
import io
import netrc
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tqdm import tqdm

from loop.config.flags import ADAPTER_FILES, Config
from loop.distributed.layout import Layout
from loop.monitor.history import PriorRun

PROJECT = "lora-loop"
SAMPLES = "samples"
# Timeouts in seconds. wandb's defaults are 90 s for connecting and no limit for the upload (wandb
# 0.31, sdk/wandb_settings.py). An incomplete upload stays in the output folder. With `quiet`, wandb
# prints only the run's address.
WANDB = {"init_timeout": 60.0, "finish_timeout": 300.0, "quiet": True}
ADAPTER = (*ADAPTER_FILES, "adapter_config.json", "training_config.yaml", "tokenizer*", "*.jinja")
NOT_LOGGED = ("step", "resumed_from")


class Trackers:
    """The trackers of --report_to; a tracker that fails is dropped.

    Only rank 0 opens them. On other ranks, every method does nothing.
    """

    def __init__(self, config: Config, layout: Layout, prior: PriorRun) -> None:
        self.config, self.layout, self.prior = config, layout, prior
        self.folder = Path(config.output_dir)
        self.name = config.run_name or self.folder.name
        self.wandb_id: str | None = prior.progress.get("wandb")
        self.opened: dict[str, Any] = {}
        self.trackio_step = 0  # trackio's last logged step; earlier entries are not logged again

    def open(self) -> None:
        """Open the trackers and log the settings; only rank 0 may call this."""
        for kind in self.config.report_to:
            if kind != "none":
                self._guarded(kind, functools.partial(self._open, kind))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Log an entry of metrics.jsonl: keys with eval_ under eval/, all others under train/."""
        values = dict(_named(entry))
        for kind, tracker in [*self.opened.items()]:
            if kind != "trackio" or entry["step"] > self.trackio_step:
                self._guarded(kind, functools.partial(tracker.log, values, step=entry["step"]))

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log the sample answers of a step as a table; all rows have the same keys."""
        for kind, tracker in [*self.opened.items()]:
            if rows and (kind != "trackio" or step > self.trackio_step):
                self._guarded(kind, functools.partial(_log_table, kind, tracker, step, rows))

    def finish(self, history: Sequence[Mapping[str, Any]], failed: bool) -> None:
        """Write wandb's summary, and close the trackers; wandb stays open for `store_adapter`."""
        for kind, tracker in [*self.opened.items()]:
            if kind != "wandb":
                finish = functools.partial(_finish_trackio, tracker)
                self._guarded(kind, finish if kind == "trackio" else tracker.finish)
                continue
            run = tracker.tracker
            self._guarded(kind, functools.partial(run.summary.update, summary(history)))
            if failed or not self.config.wandb_artifact:
                self._guarded(kind, functools.partial(run.finish, exit_code=int(failed)))
                continue
            return
        self.opened = {}

    def store_adapter(self) -> None:
        """Upload the saved adapter as a wandb artifact, if configured, and close wandb."""
        tracker = self.opened.get("wandb")
        if tracker and self.config.wandb_artifact:
            self._guarded("wandb", functools.partial(self._store, tracker.tracker))
            self._guarded("wandb", tracker.finish)
            self.opened = {}

    def _store(self, run: Any) -> None:
        from wandb import Artifact

        artifact = Artifact(re.sub(r"[^\w.-]+", "-", f"{self.name}-adapter"), type="model")
        for file in [file for pattern in ADAPTER for file in self.folder.glob(pattern)]:
            artifact.add_file(str(file))
        run.log_artifact(artifact)

    def _open(self, kind: str) -> None:
        split = dataclasses.asdict(self.layout)
        limits = {f"micro_batch_{name}": value for name, value in split.pop("limits").items()}
        settings = dataclasses.asdict(self.config) | split | limits
        words = {k: " ".join(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        if kind == "wandb":
            tracker = self._open_wandb()
        elif kind == "trackio":
            resume = "allow" if self.prior.step else "never"
            # The settings are passed here: accelerate 1.15's store_init_configuration would add
            # the key `allow_val_change` to trackio's config, which is a dict.
            tracker = LOGGER_TYPE_TO_CLASS[kind](
                PROJECT, name=self.name, resume=resume, config=words
            )
            tracker.start()
            self.trackio_step = tracker.tracker._next_step - 1  # trackio 0.43, run.py
        else:
            tracker = LOGGER_TYPE_TO_CLASS[kind](
                self.name, logging_dir=str(self.folder / kind), purge_step=self.prior.step + 1
            )
            tracker.start()
        self.opened[kind] = tracker
        if kind != "trackio":
            tracker.store_init_configuration(words)

    def _open_wandb(self) -> Any:
        # The same id continues the same run; wandb ignores steps that it already has.
        resume = {"id": self.wandb_id, "resume": "allow"} if self.wandb_id else {}
        defaults = {key: v for key, v in WANDB.items() if f"WANDB_{key.upper()}" not in os.environ}
        arguments: dict[str, Any] = {
            "name": self.name,
            "dir": str(self.folder),
            "tags": [*(self.config.tags or ())],
            "settings": defaults,
            **resume,
        }
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        if "WANDB_MODE" not in os.environ and not has_wandb_login():
            arguments |= self._offline("no login found", defaults)
        tracker = LOGGER_TYPE_TO_CLASS["wandb"](project, **arguments)
        try:
            tracker.start()
        except Exception as error:
            if type(error).__name__ != "CommError":
                raise
            reason = f"server not reached ({str(error).strip().splitlines()[0]})"
            arguments |= self._offline(reason, defaults)
            tracker = LOGGER_TYPE_TO_CLASS["wandb"](project, **arguments)
            tracker.start()
        self.wandb_id = tracker.tracker.id
        return tracker

    def _offline(self, reason: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Print why the run is kept offline, and return the arguments for wandb.init."""
        print(
            f"wandb: {reason}; the run is kept offline. To upload it later: "
            f"wandb login, then wandb sync {self.folder}/wandb/offline-run-*"
        )
        return {"mode": "offline", "settings": {**settings, "silent": True}}

    def _guarded(self, kind: str, action: Any) -> None:
        """Run a tracker's action; a tracker that fails is dropped, and training continues."""
        try:
            action()
        except Exception as error:
            self.opened = {name: t for name, t in self.opened.items() if name != kind}
            reason = f"{type(error).__name__}: {''.join(str(error).strip().splitlines()[:1])}"
            tqdm.write(f"{kind}: {reason}; training continues without it.")


def summary(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return a run's last losses, best losses with their steps, tokens and seconds."""
    totals: dict[str, float] = {}
    for key in ("loss", "eval_loss"):
        logged = [(e[key], e["step"]) for e in history if e.get(key) is not None]
        if logged:
            totals[f"final_{key}"] = logged[-1][0]
            totals[f"best_{key}"], totals[f"best_{key}_step"] = min(logged)
    for key in ("supervised_tokens", "seconds"):
        values = [entry[key] for entry in history if entry.get(key) is not None]
        totals |= {key: values[-1]} if values else {}
    return totals


def _named(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield an entry's numbers under grouped names; a dict yields one name per item."""
    for key, value in entry.items():
        name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
        parts = value if isinstance(value, Mapping) else {"": value}
        for part, number in parts.items():
            if key not in NOT_LOGGED and isinstance(number, int | float):
                # The name of a data source may be an absolute path.
                yield f"{name}/{part.lstrip('/')}" if part else name, number


def _finish_trackio(tracker: Any) -> None:
    import trackio

    # `tracker.finish` is not used: trackio 0.43 would finish the run again at exit. Both functions
    # print that they upload, which is false for a local folder.
    is_local = tracker.tracker._is_local
    with contextlib.redirect_stdout(io.StringIO()) if is_local else contextlib.nullcontext():
        trackio.finish()


def _log_table(kind: str, tracker: Any, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = [*rows[0]]
    data = [[row.get(column) for column in columns] for row in rows]
    if kind == "wandb":
        tracker.log_table(SAMPLES, columns=columns, data=data, step=step)
    elif kind == "trackio":
        from trackio import Table

        tracker.log({SAMPLES: Table(columns=columns, data=data)}, step=step)
    else:
        tracker.log({SAMPLES: as_markdown([columns, ["---"] * len(columns), *data])}, step=step)


def as_markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a Markdown table, with markup and line breaks escaped."""
    cells = [[re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(str(c))) for c in row] for row in rows]
    lines = [[cell.replace("\n", "<br>") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def has_wandb_login() -> bool:
    """Return whether wandb 0.31 finds a login, in the environment or netrc (sdk/lib/wbauth)."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    for candidate in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if candidate and netrc.netrc(os.path.expanduser(candidate)).authenticators(host):
                return True
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
    return False
