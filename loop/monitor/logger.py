"""Logs a run to the console, metrics.jsonl and the trackers, and keeps its log history."""

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
from loop.monitor.formatting import loss_text
from loop.monitor.history import PriorRun
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
    """Accumulates the metrics of each window and logs them every `logging_steps`, on rank 0.

    A context manager: every exit closes the trackers.
    The logged loss is the training objective: the sum of all ranks' losses since the last log
    entry, divided by the number of supervised tokens. Rates are per second of wall time over all
    ranks, evaluations and checkpoints included.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        accelerator: Accelerator,
        prior: PriorRun,
        clock: Clock,
        work: Work | None = None,
    ) -> None:
        self.config, self.layout, self.accelerator, self.prior = config, layout, accelerator, prior
        self.clock, self.work = clock, work
        self.watch = Watch(config.max_nonfinite_steps, prior.progress.get("bad_in_a_row", 0))
        self.folder = Path(config.output_dir)
        self.trackers = Trackers(config, layout, prior)
        self.history: list[dict[str, Any]] = []
        self.examples, self.tokens, self.supervised_tokens, self.seconds_before = 0, 0, 0, 0.0
        self.step = prior.step
        self._start_interval(torch.zeros((), device=accelerator.device))
        if prior.step:
            self._restore(prior.progress)

    def _restore(self, progress: dict[str, Any]) -> None:
        """Restore a checkpoint's counts and the loss sums since its last log entry."""
        self.examples, self.supervised_tokens = progress["examples"], progress["supervised_tokens"]
        self.tokens = progress.get("tokens", 0)  # absent from older checkpoints
        self.seconds_before = progress["seconds"]
        self.interval.update(progress["interval"]["counts"])
        sums, rank = progress["interval"]["loss_sums"], self.accelerator.process_index
        # With the same world size, each rank restores its own sum: the total is bit-identical.
        same_size = len(sums) == self.accelerator.num_processes
        self.loss_sum += sums[rank] if same_size else sum(sums) / self.accelerator.num_processes

    def state(self) -> dict[str, Any]:
        """Return the log's state for a checkpoint; every rank must call this.

        Raises RunError if too many steps in a row were non-finite.
        """
        self._count_bad_steps()
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
            self.history = history_until(self.prior.log, self.prior.step)
            self._open_log()
            self.trackers.open()
        # The bar is hidden in a file or a pipe, since the log lines hold the same numbers. With
        # `| tee log`, the bar (stderr) and the lines (stdout) would mix on the terminal.
        visible = main and sys.stderr.isatty() and sys.stdout.isatty()
        total, done = self.layout.total_steps, self.prior.step
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
            # Last, when the signal handlers are restored: a second signal interrupts the drawing.
            draw_at_end(self.folder)

    def observe(
        self, window: Window, loss_sum: Tensor, learning_rate: float, norm: Any, bad: Tensor
    ) -> None:
        """Add a window, and log if it is due; every rank must call this after each step.

        norm: the gradient norm before clipping. bad: a bool tensor of shape [], true for a
        non-finite step; the loss of such a step is not counted.
        Raises RunError if too many steps in a row were non-finite.
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
        interval = self.layout.interval(self.config.logging_strategy, self.config.logging_steps)
        if step % interval == 0 or step in (1, self.layout.total_steps):
            with self.clock("log"):
                total = self.accelerator.reduce(self.loss_sum, reduction="sum").item()
                self._count_bad_steps()
                good_tokens = self.interval["supervised_tokens"] - self.interval["bad_tokens"]
                loss = total / good_tokens if good_tokens else None
                self._log(window, loss, learning_rate, float(norm))
                self._start_interval(torch.zeros_like(self.loss_sum))

    def _count_bad_steps(self) -> None:
        bad_steps, bad_tokens = self.watch.read()
        self.interval.update(bad_steps=bad_steps, bad_tokens=bad_tokens)

    def _start_interval(self, zero: Tensor) -> None:
        self.loss_sum = zero
        self.interval = Counter[str]()
        self.logged_at = time.perf_counter()

    def _seconds(self) -> float:
        """Return the seconds in the loop, earlier parts of a resumed run included."""
        return self.seconds_before + time.perf_counter() - self.started

    def _log(self, window: Window, loss: float | None, learning_rate: float, norm: float) -> None:
        step, now = window.step + 1, time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        warning = spike(self.history, loss) if loss is not None else None
        if warning:
            tqdm.write(f"note: step {step}: {warning}")
        total = self.layout.total_steps
        left = (now - self.started) / (step - self.prior.step) * (total - step)
        peak = peak_memory(self.accelerator.device) / 2**30
        entry = {
            "step": step,
            "epoch": round(window.epoch, 4),
            "loss": loss,
            "learning_rate": learning_rate,
            # The norm of a skipped step is not finite; in fp16 the loss scale was too high.
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
        if self.prior.step and (not self.history or self.history[-1]["step"] <= self.prior.step):
            entry["resumed_from"] = self.prior.step
        self._append(entry)
        shared = f"  prefix-shared {entry['shared_share']:.0%}" if entry["shared_share"] else ""
        mfu = f"  MFU {entry['mfu']:.1%}" if "mfu" in entry else ""
        progress = (
            f"loss {loss_text(loss)}  lr {learning_rate:.2e}  grad {norm:.2f}  "
            f"{entry['tokens_per_second']:,.0f} tokens/s  "
            f"{entry['supervised_tokens_per_second']:,.0f} supervised/s  "
            f"padding {entry['padding_share']:.0%}{shared}{mfu}  {peak:.2f} GiB"
        )
        tqdm.write(f"step {step:>{len(str(total))}}/{total}  {progress}  {_clock(left)} left")
        self.bar.set_postfix_str(progress)

    def end(self, newest_checkpoint: str | None) -> None:
        """Upload the adapter, print the summary and shut down the process group."""
        self.trackers.store_adapter()
        if self.accelerator.is_main_process:
            print(self._summary(False, newest_checkpoint))
        self.accelerator.end_training()

    def _summary(self, stopped: bool, newest: str | None = None) -> str:
        """Return the run's last five lines; the time includes every launch's start-up."""
        firsts = [entry for entry in self.history if entry["step"] == 1 or "resumed_from" in entry]
        earlier = [entry for entry in firsts if entry["step"] <= self.prior.step]
        startups = sum(entry.get("startup_seconds", 0.0) for entry in earlier)
        seconds = self.seconds_before + startups + seconds_since_start()
        on_gpus, ranks = self.accelerator.device.type == "cuda", self.accelerator.num_processes
        devices = ranks if on_gpus else ranks * torch.get_num_threads()
        spent = Spent(seconds, self.tokens, self.supervised_tokens, devices, on_gpus)
        total = self.layout.total_steps
        return summary(self.config, self.history, self.step, total, spent, stopped, newest)

    def add_evaluation(self, entry: dict[str, Any]) -> None:
        """Log an evaluation."""
        if not self.accelerator.is_main_process:
            return
        self._append({**entry, "seconds": self._seconds()})
        loss, total = entry["eval_loss"], self.layout.total_steps
        tqdm.write(
            f"step {entry['step']:>{len(str(total))}}/{total}  eval loss "
            f"{loss_text(loss)}  perplexity {loss_text(entry['eval_perplexity'])}  token accuracy "
            f"{entry['eval_token_accuracy']:.1%}  {entry['eval_seconds']:.1f} s"
        )

    def add_samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Print and log the answers to the sample prompts; only rank 0 calls this."""
        for row in rows:
            tqdm.write(f"step {step}: > {row['prompt']}\n{row['answer']}")
        self.trackers.log_samples(step, rows)

    def _append(self, entry: dict[str, Any]) -> None:
        """Append an entry to metrics.jsonl, the history and the trackers."""
        self.history.append(entry)
        self.metrics.write(json.dumps(entry, allow_nan=False) + "\n")
        self.metrics.flush()
        self.trackers.log(entry)

    def _open_log(self) -> None:
        """Write the history so far to metrics.jsonl, and keep the file open."""
        partial = self.folder / "metrics.jsonl.partial"
        self.metrics = open(partial, "w", encoding="utf-8")  # noqa: SIM115
        self.metrics.writelines(json.dumps(entry, allow_nan=False) + "\n" for entry in self.history)
        self.metrics.flush()
        partial.replace(self.folder / "metrics.jsonl")


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
