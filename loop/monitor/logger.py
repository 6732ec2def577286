"""Tells how the run goes: console, metrics.jsonl, trainer_state.json, and the trackers."""

import datetime
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.errors import Stopped
from loop.config.flags import Config
from loop.distributed.layout import Layout
from loop.inputs.windows import Window
from loop.monitor.history import Progress
from loop.monitor.loss_guard import Watch, spike
from loop.monitor.metrics import (
    COUNTED,
    Clock,
    Work,
    history_until,
    peak_memory,
    rates,
    seconds_since_start,
)
from loop.monitor.plots import draw_at_end
from loop.monitor.summary import Spent, summary
from loop.monitor.trackers import Trackers


class Tracker:
    """Collects what each window reports and logs it every `logging_steps`, on rank 0 alone.

    A context manager, so that trackers are closed on every way out. The logged loss is the
    quantity that is optimised: loss sums over the steps since the last log, divided once by their
    supervised tokens, over all ranks. Rates are over all ranks and wall time, all included.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        accelerator: Accelerator,
        start: Progress,
        clock: Clock,
        work: Work | None = None,
    ) -> None:
        self.config, self.layout, self.accelerator, self.start = config, layout, accelerator, start
        self.clock, self.work = clock, work
        self.watch = Watch(config.max_nonfinite_steps, start.saved.get("bad_in_a_row", 0))
        self.folder = Path(config.output_dir)
        self.trackers = Trackers(config, layout, start)
        self.history: list[dict[str, Any]] = []
        self.examples, self.tokens, self.supervised_tokens, self.seconds_before = 0, 0, 0, 0.0
        self.step = start.step
        self._start_interval(torch.zeros((), device=accelerator.device))
        if start.step:
            self._go_on(start.saved)

    def _go_on(self, progress: dict[str, Any]) -> None:
        """Take up the counts of a checkpoint, and the loss since its last log entry."""
        self.examples, self.supervised_tokens = progress["examples"], progress["supervised_tokens"]
        self.tokens = progress.get("tokens", 0)  # which older checkpoints do not tell
        self.seconds_before = progress["seconds"]
        self.interval.update(progress["interval"]["counts"])
        sums, rank = progress["interval"]["loss_sums"], self.accelerator.process_index
        # As many ranks as before: each has its own part, so that the sum is the same to the bit.
        same = len(sums) == self.accelerator.num_processes
        self.loss_sum += sums[rank] if same else sum(sums) / self.accelerator.num_processes

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the log; every rank must call this.

        Raises Fault where too many steps in a row were bad.
        """
        self._ask()
        sums = self.accelerator.gather(self.loss_sum).reshape(-1).tolist()
        return {
            "examples": self.examples,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "seconds": self._seconds(),
            "interval": {"loss_sums": sums, "counts": dict(self.interval)},
            "bad_in_a_row": self.watch.in_a_row,
            "wandb": self.trackers.wandb_id,
        }

    def __enter__(self) -> "Tracker":
        main = self.accelerator.is_main_process
        self.started = time.perf_counter()
        self.startup = seconds_since_start()
        if main:
            self.history = history_until(self.start.log, self.start.step)
            self._open_log()
            self.trackers.open()
        # In a file or a pipe the log lines say the same, without a redrawn bar between them. A
        # terminal that they reach through a pipe (`| tee log`) would mix them with it.
        visible = main and sys.stderr.isatty() and sys.stdout.isatty()
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
        stopped = isinstance(error, Stopped)
        self.trackers.finish(self.history, failed=error is not None and not stopped)
        if stopped:
            print(self._summary(stopped=True), flush=True)
            # Last, and with signals as they are outside of the loop: a second one ends it at once.
            draw_at_end(self.folder)

    def observe(
        self, window: Window, loss_sum: Tensor, learning_rate: float, norm: Any, bad: Tensor
    ) -> None:
        """Count a window; where a log is due, every rank takes part in it.

        Raises Fault where too many steps in a row were bad; the loss is of the others.
        """
        self.loss_sum += torch.where(bad, torch.zeros_like(loss_sum), loss_sum)
        ids = window.ids if self.accelerator.is_main_process else ()
        self.watch.add(window.step + 1, bad, window.supervised_tokens, ids)
        self.interval.update({name: getattr(window, name) for name in COUNTED})
        self.tokens += window.tokens
        self.supervised_tokens += window.supervised_tokens
        self.examples += window.examples
        self.bar.update()
        self.step = step = window.step + 1
        interval = {
            "steps": self.config.logging_steps,
            "epoch": self.layout.steps_per_epoch,
            "no": self.layout.total_steps,
        }[self.config.logging_strategy]
        if every(interval, step) or step in (1, self.layout.total_steps):
            with self.clock("log"):
                total = self.accelerator.reduce(self.loss_sum, reduction="sum").item()
                self._ask()
                good_tokens = self.interval["supervised_tokens"] - self.interval["bad_tokens"]
                loss = total / good_tokens if good_tokens else None
                self._log(window, loss, learning_rate, float(norm))
                self._start_interval(torch.zeros_like(self.loss_sum))

    def _ask(self) -> None:
        bad_steps, bad_tokens = self.watch.ask()
        self.interval.update(bad_steps=bad_steps, bad_tokens=bad_tokens)

    def _start_interval(self, zero: Tensor) -> None:
        self.loss_sum = zero
        self.interval = Counter[str]()
        self.logged_at = time.perf_counter()

    def _seconds(self) -> float:
        """Return the seconds since the run began, what a checkpoint's run took included."""
        return self.seconds_before + time.perf_counter() - self.started

    def _log(self, window: Window, loss: float | None, learning_rate: float, norm: float) -> None:
        step, now = window.step + 1, time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        warning = spike(self.history, loss) if loss is not None else None
        if warning:
            tqdm.write(f"note: step {step}: {warning}")
        total = self.layout.total_steps
        left = (now - self.started) / (step - self.start.step) * (total - step)
        peak = peak_memory(self.accelerator.device) / 2**30
        entry = {
            "step": step,
            "epoch": round(window.epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate,
            # Not finite where no update was made: in fp16, the loss scale was too high.
            "grad_norm": norm if math.isfinite(norm) else None,
            "supervised_tokens": self.supervised_tokens,
            "examples": self.examples,
            **rates(self.interval, now - self.logged_at, self.layout.world_size, self.work),
            "bad_steps": self.interval["bad_steps"],
            "peak_memory_gib": peak,
            "seconds": self._seconds(),
            "eta_seconds": left,
            "startup_seconds": self.startup,
            **{f"{name}_seconds": spent for name, spent in self.clock.take().items()},
        }
        if self.start.step and (not self.history or self.history[-1]["step"] <= self.start.step):
            entry["resumed_from"] = self.start.step
        self._keep(entry)
        shared = f"  shared {entry['shared_share']:.0%}" if entry["shared_share"] else ""
        mfu = f"  MFU {entry['mfu']:.1%}" if "mfu" in entry else ""
        progress = (
            f"loss {_shown(loss)}  lr {learning_rate:.2e}  grad {norm:.2f}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s  "
            f"{entry['supervised_tokens_per_second']:,.0f} supervised/s  "
            f"padding {entry['padding_share']:.0%}{shared}{mfu}  {peak:.2f} GiB"
        )
        tqdm.write(f"step {step:>{len(str(total))}}/{total}  {progress}  {_clock(left)} left")
        self.bar.set_postfix_str(progress)

    def end(self, newest_checkpoint: str | None) -> None:
        """Give the saved adapter to who asked for it, tell the result, and leave the others."""
        self.trackers.store_adapter()
        if self.accelerator.is_main_process:
            print(self._summary(False, newest_checkpoint))
        self.accelerator.end_training()

    def _summary(self, stopped: bool, newest: str | None = None) -> str:
        """Return the run's last lines; its time holds all its launches, from their very start."""
        begun = [entry for entry in self.history if entry["step"] == 1 or "resumed_from" in entry]
        before = sum(e.get("startup_seconds", 0.0) for e in begun if e["step"] <= self.start.step)
        seconds = self.seconds_before + before + seconds_since_start()
        on_gpus, ranks = self.accelerator.device.type == "cuda", self.accelerator.num_processes
        devices = ranks if on_gpus else ranks * torch.get_num_threads()
        spent = Spent(seconds, self.tokens, self.supervised_tokens, devices, on_gpus)
        total = self.layout.total_steps
        return summary(self.config, self.history, self.step, total, spent, stopped, newest)

    def add_evaluation(self, entry: dict[str, Any]) -> None:
        """Log an evaluation."""
        if not self.accelerator.is_main_process:
            return
        self._keep({**entry, "seconds": self._seconds()})
        loss, total = entry["eval_loss"], self.layout.total_steps
        tqdm.write(
            f"step {entry['step']:>{len(str(total))}}/{total}  eval loss "
            f"{_shown(loss)}  perplexity {_shown(entry['eval_perplexity'])}  token accuracy "
            f"{entry['eval_token_accuracy']:.1%}  {entry['eval_seconds']:.1f} s"
        )

    def add_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Print what the model answered to the sample prompts; on the first rank."""
        for row in rows:
            tqdm.write(f"step {step}: > {row['prompt']}\n{row['answer']}")
        self.trackers.log_samples(step, rows)

    def _keep(self, entry: dict[str, Any]) -> None:
        """Add an entry to the log and to the trackers."""
        self.history.append(entry)
        self.metrics.write(json.dumps(entry, allow_nan=False) + "\n")
        self.metrics.flush()
        self.trackers.log(entry)

    def _open_log(self) -> None:
        """Open metrics.jsonl, holding what the log holds so far."""
        partial = self.folder / "metrics.jsonl.partial"
        self.metrics = open(partial, "w", encoding="utf-8")  # noqa: SIM115
        self.metrics.writelines(json.dumps(entry, allow_nan=False) + "\n" for entry in self.history)
        self.metrics.flush()
        partial.replace(self.folder / "metrics.jsonl")


def every(interval: int, step: int) -> bool:
    """Whether something that happens each `interval` steps is due after `step` steps."""
    return step % interval == 0


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
