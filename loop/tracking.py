"""Tells how the run goes: console, metrics.jsonl, trainer_state.json, wandb and TensorBoard."""

import dataclasses
import datetime
import functools
import json
import math
import netrc
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor
from tqdm import tqdm

from loop.config import Config
from loop.resume import Start
from loop.windows import Layout, Window

PROJECT = "lora-loop"


class Tracker:
    """Collects what each window reports and logs it every `logging_steps`, on rank 0 alone.

    A context manager, so that trackers are closed on every way out. The logged loss is the
    quantity that is optimised: loss sums over the steps since the last log, divided once by their
    supervised tokens, over all ranks. Rates are over all ranks and wall time, all included.
    """

    def __init__(
        self, config: Config, layout: Layout, accelerator: Accelerator, start: Start
    ) -> None:
        self.config, self.layout, self.accelerator, self.start = config, layout, accelerator, start
        self.folder = Path(config.output_dir)
        self.trackers: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.examples, self.supervised_tokens, self.seconds_before = 0, 0, 0.0
        self._start_interval(torch.zeros((), device=accelerator.device))
        if start.step:
            self._go_on(start.progress)

    def _go_on(self, progress: dict[str, Any]) -> None:
        """Take up the counts of a checkpoint, and the loss since its last log entry."""
        self.examples, self.supervised_tokens = progress["examples"], progress["supervised_tokens"]
        self.seconds_before = progress["seconds"]
        self.interval_supervised = progress["interval"]["supervised_tokens"]
        self.interval_tokens = progress["interval"]["tokens"]
        sums, rank = progress["interval"]["loss_sums"], self.accelerator.process_index
        # As many ranks as before: each has its own part, so that the sum is the same to the bit.
        same = len(sums) == self.accelerator.num_processes
        self.loss_sum += sums[rank] if same else sum(sums) / self.accelerator.num_processes

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the log; every rank must call this."""
        sums = self.accelerator.gather(self.loss_sum).reshape(-1).tolist()
        return {
            "examples": self.examples,
            "supervised_tokens": self.supervised_tokens,
            "seconds": self._seconds(),
            "interval": {
                "loss_sums": sums,
                "supervised_tokens": self.interval_supervised,
                "tokens": self.interval_tokens,
            },
            "wandb": self.wandb_id,
        }

    def __enter__(self) -> "Tracker":
        main = self.accelerator.is_main_process
        self.started = time.perf_counter()
        self.wandb_id = self.start.progress.get("wandb")
        if main:
            self.history = history_until(self.start.log, self.start.step)
            self._open_log()
            for kind in self.config.report_to:
                self._guarded(kind, functools.partial(self._open_tracker, kind))
        # In a file or a pipe the log lines say the same, without a redrawn bar between them.
        visible = main and sys.stderr.isatty()
        total, done = self.layout.total_steps, self.start.step
        self.bar = tqdm(
            total=total, initial=done, unit="step", disable=not visible, dynamic_ncols=True
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if not self.accelerator.is_main_process:
            return
        self.metrics.close()
        for name, tracker in self.trackers.items():
            self._guarded(name, tracker.finish)

    def observe(self, window: Window, loss_sum: Tensor, learning_rate: float, norm: Any) -> None:
        """Count a window; where a log is due, every rank takes part in it.

        Raises FloatingPointError for a loss that is not finite.
        """
        self.loss_sum += loss_sum
        self.interval_supervised += window.supervised_tokens
        self.interval_tokens += window.tokens
        self.supervised_tokens += window.supervised_tokens
        self.examples += window.examples
        self.bar.update()
        step = window.step + 1
        interval = {
            "steps": self.config.logging_steps,
            "epoch": self.layout.steps_per_epoch,
            "no": self.layout.total_steps,
        }[self.config.logging_strategy]
        if every(interval, step) or step in (1, self.layout.total_steps):
            total = self.accelerator.reduce(self.loss_sum, reduction="sum")
            self._log(window, total.item() / self.interval_supervised, learning_rate, float(norm))
            self._start_interval(torch.zeros_like(self.loss_sum))

    def _start_interval(self, zero: Tensor) -> None:
        self.loss_sum = zero
        self.interval_supervised = self.interval_tokens = 0
        self.logged_at = time.perf_counter()

    def _seconds(self) -> float:
        """Return the seconds since the run began, what a checkpoint's run took included."""
        return self.seconds_before + time.perf_counter() - self.started

    def _log(self, window: Window, loss: float, learning_rate: float, norm: float) -> None:
        step, now = window.step + 1, time.perf_counter()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"step {step}: the loss is {loss}; expected a finite number. Lower the "
                "learning rate, or train in bf16 or fp32 if this is fp16. Nothing was saved."
            )
        if not self.accelerator.is_main_process:
            return
        elapsed, seconds = now - self.logged_at, self._seconds()
        entry = {
            "step": step,
            "epoch": round(window.epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate,
            # fp16: not finite where the loss scale was too high and the update skipped.
            "grad_norm": norm if math.isfinite(norm) else None,
            "supervised_tokens": self.supervised_tokens,
            "tokens_per_second": self.interval_tokens / elapsed,
            "supervised_tokens_per_second": self.interval_supervised / elapsed,
            "seconds": seconds,
        }
        self.history.append(entry)
        self.metrics.write(json.dumps(entry, allow_nan=False) + "\n")
        self.metrics.flush()
        for name, tracker in [*self.trackers.items()]:
            values = {
                f"train/{key}": value
                for key, value in entry.items()
                if key != "step" and value is not None
            }
            self._guarded(name, lambda t=tracker, v=values: t.log(v, step=step))
        total = self.layout.total_steps
        here = now - self.started
        left = here / (step - self.start.step) * (total - step)
        progress = (
            f"loss {loss:.4f}  lr {learning_rate:.2e}  {entry['tokens_per_second']:,.0f} tokens/s  "
            f"{entry['supervised_tokens_per_second']:,.0f} supervised/s"
        )
        tqdm.write(f"step {step:>{len(str(total))}}/{total}  {progress}  {_clock(left)} left")
        self.bar.set_postfix_str(progress)

    def _open_log(self) -> None:
        """Open metrics.jsonl, holding what the log holds so far."""
        partial = self.folder / "metrics.jsonl.partial"
        self.metrics = open(partial, "w", encoding="utf-8")  # noqa: SIM115
        self.metrics.writelines(json.dumps(entry, allow_nan=False) + "\n" for entry in self.history)
        self.metrics.flush()
        partial.replace(self.folder / "metrics.jsonl")

    def _open_tracker(self, kind: str) -> None:
        if kind == "none":
            return
        name = self.config.run_name or self.folder.name
        if kind == "wandb":
            # The same id makes it the same run there; steps that it has already are passed over.
            again = {"id": self.wandb_id, "resume": "allow"} if self.wandb_id else {}
            arguments = {"name": name, "dir": str(self.folder), **self._wandb_mode(), **again}
            tracker = LOGGER_TYPE_TO_CLASS[kind](PROJECT, **arguments)
        else:
            tracker = LOGGER_TYPE_TO_CLASS[kind](
                name, logging_dir=str(self.folder / kind), purge_step=self.start.step + 1
            )
        tracker.start()
        if kind == "wandb":
            self.wandb_id = tracker.tracker.id
        self.trackers[kind] = tracker
        settings = dataclasses.asdict(self.config) | dataclasses.asdict(self.layout)
        words = {k: " ".join(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        tracker.store_init_configuration(words)

    def _wandb_mode(self) -> dict[str, str]:
        if "WANDB_MODE" in os.environ or _has_wandb_login():
            return {}
        print(
            "wandb: no login found, so the run is kept offline. To upload it later: "
            f"wandb login, then wandb sync {self.folder}/wandb/offline-run-*"
        )
        return {"mode": "offline"}

    def _guarded(self, name: str, action: Any) -> None:
        """Run a tracker's action; a tracker that fails is dropped, and training goes on."""
        try:
            action()
        except Exception as error:
            self.trackers = {kind: t for kind, t in self.trackers.items() if kind != name}
            reason = str(error).strip().splitlines()[:1]
            tqdm.write(f"{name}: {type(error).__name__}: {''.join(reason)}; going on without it.")


def history_until(file: Path | None, step: int) -> list[dict[str, Any]]:
    """Return the log up to a step, from metrics.jsonl; what a kill has cut off is passed over."""
    history: list[dict[str, Any]] = []
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines() if file else []
    except OSError as error:
        tqdm.write(f"note: {file}: {error.strerror}: the log begins anew at step {step}")
        return history
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            history.append(entry)
    return history


def every(interval: int, step: int) -> bool:
    """Whether something that happens each `interval` steps is due after `step` steps."""
    return step % interval == 0


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _has_wandb_login() -> bool:
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
