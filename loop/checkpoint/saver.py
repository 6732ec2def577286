"""Writes checkpoints in a background thread, and stops all ranks after the same step."""

import datetime
import platform
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from tqdm import tqdm

from data.errors import RunError, Stopped
from loop.checkpoint import storage
from loop.checkpoint.resume import ResumePoint
from loop.checkpoint.storage import Snapshot
from loop.config.flags import Config
from loop.distributed import optimizer_state
from loop.distributed.accelerator import COLLECTIVE_TIMEOUT, raise_on_all_ranks, zero_stage
from loop.distributed.layout import Layout
from loop.distributed.memory import micro_batch_record
from loop.distributed.signals import STOP_SIGNALS, launcher_asks
from loop.inputs.windows import Window
from loop.monitor.logger import Tracker
from loop.monitor.summary import how_to_resume
from loop.utils import adapter_settings, file_name, trained_parameters

# Kinds of a rank's request; the greatest of all ranks is carried out. After ASKED (a STOP file, or
# launch.sh itself was stopped), launch.sh --until-done does not launch again.
GO_ON, SAVE, TIME_IS_OVER, SIGNAL, ASKED, FAILED = range(6)
BEGAN = time.monotonic()  # --max_minutes includes the time to read data and model.


@dataclass(frozen=True)
class Request:
    """One rank's request after a step, and its reason. machine: the machine's first rank."""

    kind: int
    reason: str = ""
    machine: int = 0
    host: str = ""


def agreed_reason(requests: Sequence[Request], wanted: int) -> str:
    """Return why the run stops: the reason of the first rank whose request is `wanted`.

    requests: one per rank, so that every rank returns the same text. A rank's own state is not
    enough, since ranks see the same request at different times.
    """
    source = next(request for request in requests if request.kind == wanted)
    if len({request.machine for request in requests}) == 1:
        return source.reason
    # On another machine, launch.sh --until-done launches again unless the reason contains STOP.
    word = "STOP on machine" if wanted == ASKED else "on machine"
    return f"{word} {source.host}: {source.reason}"


class Saver:
    """Checks after each step whether a checkpoint is due or a stop was requested.

    Use it as a context manager. Inside, a signal becomes a request that is carried out after the
    step. On exit, the writer thread has finished.
    """

    def __init__(
        self, config: Config, layout: Layout, accelerator: Accelerator, start: ResumePoint
    ) -> None:
        self.config, self.layout, self.accelerator, self.start = config, layout, accelerator, start
        self.output, self.main = Path(config.output_dir), accelerator.is_main_process
        self.saved_at = time.monotonic()
        # Identifies the machine, since two machines may have the same host name.
        self.machine = accelerator.process_index - accelerator.local_process_index
        self.request, self.interrupts = self._request(GO_ON), 0
        self.writer: threading.Thread | None = None
        self.failure: Exception | None = None
        self.saves, self.stall = 0, 0.0  # checkpoints, and seconds that the loop waited for them
        self.last_step = layout.total_steps  # An evaluation may end the run earlier.
        self.due_at = -1  # the step of an evaluation whose checkpoint is kept
        nothing = {"best_metric": None, "best_step": None, "evaluated_step": None, "stale": 0}
        self.evaluation: dict[str, Any] = nothing | {
            name: value for name, value in start.progress.items() if name in nothing
        }

    def __enter__(self) -> "Saver":
        self.group = None
        if self.accelerator.num_processes > 1:
            # On the CPU: agreeing on a request must not wait for the GPU.
            self.group = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        with raise_on_all_ranks():
            if self.main:
                self._check_room()
        self.entered = time.monotonic()
        self.handlers = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self._wait()
        if self.main and self.saves:
            share = self.stall / (time.monotonic() - self.entered)
            tqdm.write(  # The progress bar is still open.
                f"checkpoints: {self.saves}; checkpoint stall {self.stall:.2f} s "
                f"({share:.2%} of the loop's time)"
            )

    def maybe_save(self, window: Window, model: Any, optimizer: Any, tracker: Tracker) -> None:
        """Save if a checkpoint is due; every rank must call this after each step.

        Raises Stopped after a requested stop, RunError if the previous checkpoint was not written.
        """
        with tracker.clock("save"):
            self._maybe_save(window, model, optimizer, tracker)

    def _maybe_save(self, window: Window, model: Any, optimizer: Any, tracker: Tracker) -> None:
        step = window.step + 1
        last = step == self.last_step
        request = self._wanted()
        wanted = self._greatest(request.kind)
        if wanted < FAILED and (wanted or self._due(step) or (last and self._saves)):
            before = time.monotonic()
            self._save(window, model, optimizer, tracker)
            self.stall += time.monotonic() - before
            if wanted > SAVE or last:
                self._wait()
                wanted = max(wanted, self._greatest(FAILED if self.failure else GO_ON))
        if wanted == FAILED:
            failure = self.failure or RunError("rank 0 could not write a checkpoint")
            if isinstance(failure, RunError):
                failure.known_to_all = True
            raise failure
        if wanted > SAVE and not last:
            self._stop(step, request, wanted)

    def is_asked(self) -> bool:
        """Return whether any rank must stop or cannot save; every rank must call this."""
        return self._greatest(self._wanted().kind) > SAVE

    def stop(self, step: int) -> None:
        """Raise Stopped between two steps; the checkpoint of `step` must exist already."""
        request = self._wanted()
        self._stop(step, request, self._greatest(request.kind))

    def _stop(self, step: int, request: Request, wanted: int) -> NoReturn:
        """Raise Stopped. request: this rank's request when all ranks agreed on `wanted`."""
        requests = [request]
        if self.group is not None:
            requests *= self.accelerator.num_processes
            torch.distributed.all_gather_object(requests, request, group=self.group)
        stopped = Stopped(
            f"{agreed_reason(requests, wanted)}; checkpoint-{step} is saved; "
            f"{how_to_resume(self.config)}."
        )
        stopped.known_to_all = True
        raise stopped

    @property
    def _saves(self) -> bool:
        return self.config.save_strategy != "no"

    def _check_room(self) -> None:
        """Raise UserError if the planned checkpoints do not fit on the disk."""
        saves, keep = planned_saves(self.config, self.layout, self.start.step)
        storage.check_room(self.output, self.start.parameters, saves, keep)

    def _due(self, step: int) -> bool:
        interval = self.layout.interval(self.config.save_strategy, self.config.save_steps)
        return step % interval == 0 or step == self.due_at

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.interrupts += number == signal.SIGINT
        if self.interrupts > 1:
            raise RunError("interrupted twice: stopped at once, without a checkpoint")
        kind = ASKED if launcher_asks() else SIGNAL
        if kind > self.request.kind:
            self.request = self._request(kind, f"{signal.Signals(number).name} was received")

    def _request(self, kind: int, reason: str = "") -> Request:
        return Request(kind, reason, self.machine, platform.node())

    def _wanted(self) -> Request:
        """Return this rank's request after a step; rank 0 checks the clock and the STOP file.

        A signal may replace `self.request` at any time, so callers must keep the returned one.
        """
        if self.failure:
            return self._request(FAILED)
        if self.main and self.request.kind < SIGNAL:
            now, limit = time.monotonic(), self.config.max_minutes
            if (self.output / "STOP").exists():
                self.request = self._request(ASKED, f"found {self.output / 'STOP'}")
            elif limit and now - BEGAN > 60 * limit:
                self.request = self._request(TIME_IS_OVER, f"--max_minutes {limit:g} are over")
            elif self.config.save_minutes and now - self.saved_at > 60 * self.config.save_minutes:
                return self._request(SAVE)
        return self.request

    def _greatest(self, wanted: int) -> int:
        if self.group is None:
            return wanted
        found = torch.tensor(wanted)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(found)

    def _save(self, window: Window, model: Any, optimizer: Any, tracker: Tracker) -> None:
        """Copy the state to host memory on all ranks; a thread of rank 0 writes it."""
        model = self.accelerator.unwrap_model(model)
        adapter = trained_parameters(model, keep=self.main)
        moments = optimizer_state.moments(model, optimizer, keep=self.main)
        logged = tracker.state()
        self.saved_at = time.monotonic()
        if not self.main:
            return
        self._wait()
        self.saves += 1
        step, epoch = window.step + 1, self.layout.steps_per_epoch
        batch = self.layout.global_batch_size
        progress = {
            "step": step,
            "max_steps": self.layout.total_steps,
            "epoch": window.epoch,
            "cursor": step % epoch * batch,  # examples of the epoch's permutation that are done
            "examples": tracker.examples,
            **self.evaluation,
            # A micro-batch's random seed is derived from these, its rank and its index.
            "rng": {"seed": self.config.seed, "step": step},
            "auto_micro_batch": micro_batch_record(self.layout, self.config, self.accelerator),
            "loss_scale": optimizer_state.loss_scale(self.accelerator, optimizer),
            **logged,
        }
        stage = zero_stage(self.accelerator)
        backend = f"ZeRO-{stage}" if stage else self.accelerator.distributed_type.value
        manifest = {
            "saved_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "world_size": self.accelerator.num_processes,
            "backend": backend,
            "facts": self.start.facts,
        }
        adapter = {file_name(name): tensor for name, tensor in adapter.items()}
        snapshot = Snapshot(adapter, moments, adapter_settings(model), progress, manifest)
        self.writer = threading.Thread(target=self._write, args=(snapshot,))
        self.writer.start()

    def _write(self, snapshot: Snapshot) -> None:
        try:
            best = snapshot.progress["best_step"] if self.config.load_best_model_at_end else None
            storage.write(self.output, snapshot, self.config.save_total_limit, best)
        except Exception as error:
            self.failure = error

    def _wait(self) -> None:
        if self.writer:
            self.writer.join()


def planned_saves(config: Config, layout: Layout, done: int = 0) -> tuple[int, int | None]:
    """Return how many checkpoints are written after step `done`, and how many are kept at most."""
    steps = layout.total_steps - done
    interval = layout.interval(config.save_strategy, config.save_steps)
    saves = ceil(steps / interval) if config.save_strategy != "no" else 0
    keep = config.save_total_limit
    if config.load_best_model_at_end:  # Each evaluation may be the best so far.
        saves += ceil(steps / layout.interval(config.eval_strategy, config.eval_steps))
        keep = keep and keep + 1
    if config.save_minutes:  # The number of checkpoints is unknown.
        saves = max(saves, keep or 1)
    return saves, keep
