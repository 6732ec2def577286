"""Opens, fills and closes wandb, TensorBoard and trackio, by accelerate's trackers."""

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
from loop.monitor.history import Progress

PROJECT = "lora-loop"
SAMPLES = "samples"
# Seconds. wandb's own are 90 until it gives up to connect, and for ever until all is uploaded; what
# is not uploaded lies in the output folder (wandb 0.31, sdk/wandb_settings.py).
# Quiet: the run's address, without its version, tables of all that was logged, and advice.
WANDB = {"init_timeout": 60.0, "finish_timeout": 300.0, "quiet": True}
ADAPTER = (*ADAPTER_FILES, "adapter_config.json", "training_config.yaml", "tokenizer*", "*.jinja")
NOT_SHOWN = ("step", "resumed_from")


class Trackers:
    """Those that --report_to names, on the first rank; one that fails is dropped.

    On the other ranks none is ever opened, so that nothing happens there.
    """

    def __init__(self, config: Config, layout: Layout, start: Progress) -> None:
        self.config, self.layout, self.start = config, layout, start
        self.folder = Path(config.output_dir)
        self.name = config.run_name or self.folder.name
        self.wandb_id: str | None = start.saved.get("wandb")
        self.opened: dict[str, Any] = {}
        self.shown_until = 0  # trackio's last step: what it has is not logged again

    def open(self) -> None:
        """Open them, with the run's settings; only the first rank may call this."""
        for kind in self.config.report_to:
            if kind != "none":
                self._guarded(kind, functools.partial(self._open, kind))

    def log(self, entry: Mapping[str, Any]) -> None:
        """Log an entry of metrics.jsonl: what begins with eval_ under eval/, else under train/."""
        values = dict(_named(entry))
        for kind, tracker in [*self.opened.items()]:
            if kind != "trackio" or entry["step"] > self.shown_until:
                self._guarded(kind, functools.partial(tracker.log, values, step=entry["step"]))

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show what the model answers after a step: a table of rows with the same columns."""
        for kind, tracker in [*self.opened.items()]:
            if rows and (kind != "trackio" or step > self.shown_until):
                self._guarded(kind, functools.partial(_log_table, kind, tracker, step, rows))

    def finish(self, history: Sequence[Mapping[str, Any]], failed: bool) -> None:
        """Close them; at wandb with a summary, and left open where the adapter is to follow."""
        for kind, tracker in [*self.opened.items()]:
            if kind != "wandb":
                local = functools.partial(_finish_trackio, tracker)
                self._guarded(kind, local if kind == "trackio" else tracker.finish)
                continue
            run = tracker.tracker
            self._guarded(kind, functools.partial(run.summary.update, summary(history)))
            if failed or not self.config.wandb_artifact:
                self._guarded(kind, functools.partial(run.finish, exit_code=int(failed)))
                continue
            return
        self.opened = {}

    def store_adapter(self) -> None:
        """Give wandb the adapter as an artifact, where asked for, once it is saved; close it."""
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
            resume = "allow" if self.start.step else "never"
            # Its config is a dict, to which accelerate 1.15 would add an `allow_val_change`.
            tracker = LOGGER_TYPE_TO_CLASS[kind](
                PROJECT, name=self.name, resume=resume, config=words
            )
            tracker.start()
            self.shown_until = tracker.tracker._next_step - 1  # trackio 0.43, run.py
        else:
            tracker = LOGGER_TYPE_TO_CLASS[kind](
                self.name, logging_dir=str(self.folder / kind), purge_step=self.start.step + 1
            )
            tracker.start()
        self.opened[kind] = tracker
        if kind != "trackio":
            tracker.store_init_configuration(words)

    def _open_wandb(self) -> Any:
        # The same id makes it the same run there; steps that it has already are passed over.
        again = {"id": self.wandb_id, "resume": "allow"} if self.wandb_id else {}
        ours = {key: v for key, v in WANDB.items() if f"WANDB_{key.upper()}" not in os.environ}
        arguments: dict[str, Any] = {
            "name": self.name,
            "dir": str(self.folder),
            "tags": [*(self.config.tags or ())],
            "settings": ours,
            **again,
        }
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        if "WANDB_MODE" not in os.environ and not has_wandb_login():
            arguments |= self._offline("no login found", ours)
        tracker = LOGGER_TYPE_TO_CLASS["wandb"](project, **arguments)
        try:
            tracker.start()
        except Exception as error:
            if type(error).__name__ != "CommError":
                raise
            arguments |= self._offline(f"not reached ({str(error).strip().splitlines()[0]})", ours)
            tracker = LOGGER_TYPE_TO_CLASS["wandb"](project, **arguments)
            tracker.start()
        self.wandb_id = tracker.tracker.id
        return tracker

    def _offline(self, reason: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Say why the run is kept offline, in place of wandb's own lines; return how to have it."""
        print(
            f"wandb: {reason}, so the run is kept offline. To upload it later: "
            f"wandb login, then wandb sync {self.folder}/wandb/offline-run-*"
        )
        return {"mode": "offline", "settings": {**settings, "silent": True}}

    def _guarded(self, kind: str, action: Any) -> None:
        """Run a tracker's action; a tracker that fails is dropped, and training goes on."""
        try:
            action()
        except Exception as error:
            self.opened = {name: t for name, t in self.opened.items() if name != kind}
            reason = str(error).strip().splitlines()[:1]
            tqdm.write(f"{kind}: {type(error).__name__}: {''.join(reason)}; going on without it.")


def summary(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return what sums a run up: its last loss, its best ones and their steps, tokens, seconds."""
    found: dict[str, float] = {}
    for key in ("loss", "eval_loss"):
        logged = [(e[key], e["step"]) for e in history if e.get(key) is not None]
        if logged:
            found[f"final_{key}"] = logged[-1][0]
            found[f"best_{key}"], found[f"best_{key}_step"] = min(logged)
    for key in ("supervised_tokens", "seconds"):
        values = [entry[key] for entry in history if entry.get(key) is not None]
        found |= {key: values[-1]} if values else {}
    return found


def _named(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an entry under the names that trackers group by; of a dict, each one."""
    for key, value in entry.items():
        name = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
        parts = value if isinstance(value, Mapping) else {"": value}
        for part, number in parts.items():
            if key not in NOT_SHOWN and isinstance(number, int | float):
                # A source may be a file of an absolute path.
                yield f"{name}/{part.lstrip('/')}" if part else name, number


def _finish_trackio(tracker: Any) -> None:
    import trackio

    # Not its run's own `finish`: trackio 0.43 finishes that one again at the exit. Both print that
    # they upload, which to the folder beside is no news.
    here = tracker.tracker._is_local
    with contextlib.redirect_stdout(io.StringIO()) if here else contextlib.nullcontext():
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
    """Return rows as a Markdown table in which a text stays in its cell, and is no markup."""
    cells = [[re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(str(c))) for c in row] for row in rows]
    lines = [[cell.replace("\n", "<br>") for cell in row] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def has_wandb_login() -> bool:
    """Look where wandb 0.31 looks (sdk/lib/wbauth): environment, then the netrc file."""
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
