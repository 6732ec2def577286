"""Evaluation during training: held-out loss, samples, best checkpoint and early stopping."""

import math
import time
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from data.batching.balance import ExampleBatch, assign_micro_batches
from data.encoding.encode import IGNORE_INDEX, Example
from data.errors import UserError
from loop.checkpoint import storage
from loop.checkpoint.saver import Saver
from loop.config.flags import Config
from loop.distributed import optimizer_state
from loop.distributed.accelerator import broadcast_flag, raise_on_all_ranks
from loop.distributed.layout import Layout
from loop.distributed.rank_zero import print_rank0
from loop.inputs.training_data import TrainingData
from loop.inputs.windows import Window
from loop.monitor.logger import Tracker
from loop.monitor.metrics import history_until
from loop.training.loss import token_losses
from loop.training.optim import lr_at
from loop.training.samples import FILE, Sampler, read_prompts, write_samples

ANSWER_POSITIONS = 8  # reported separately; the last includes all later answers
MICRO_BATCHES_AT_ONCE = 16  # per rank, balanced together


class Evaluator:
    """Evaluates between steps, without an effect on training.

    Every rank must call its methods after the same steps.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        accelerator: Accelerator,
        data: TrainingData,
        model: Any,
        tracker: Tracker,
        saver: Saver,
    ) -> None:
        self.config, self.layout, self.accelerator = config, layout, accelerator
        self.data, self.model, self.tracker, self.saver = data, model, tracker, saver
        self.folder, self.known = Path(config.output_dir), saver.evaluation
        size = 1 if data.base.alone else config.per_device_eval_batch_size or layout.limits.examples
        self.limits = replace(layout.limits, examples=size, finer=False)
        # Cumulative number of dialogues after each source.
        held_out = data.held_out
        self.sources = [*accumulate(held_out.tally.sources)] if held_out else []
        prompts = read_prompts(config, accelerator)
        self.sampler = Sampler(data, config, accelerator, prompts, size, layout.chunk_tokens)
        self.evaluates = config.eval_strategy != "no" and bool(data.held_out or prompts)

    def begin(self) -> None:
        """Put the model into training mode, and repeat an evaluation that a stop interrupted."""
        self.model.train()
        start, main = self.tracker.prior, self.accelerator.is_main_process
        if self.sampler.prompts and main:
            earlier = history_until(self.folder / FILE if start.step else None, start.step)
            write_samples(self.folder, earlier, replace=True)
        self._forget_missing_best()
        was_due = start.step and self._due(start.step)
        if was_due and self.known["evaluated_step"] != start.step:
            done = self._evaluate(start.step, start.progress["epoch"])
            if not done:
                self.saver.stop(start.step)

    def until_early_stop(self, windows: Iterator[Window]) -> Iterator[Window]:
        """Yield the windows until early stopping."""
        while not self._out_of_patience() and (window := next(windows, None)) is not None:
            yield window

    def maybe_evaluate(self, window: Window) -> None:
        """Evaluate if an evaluation is due after this window; a stop request interrupts it."""
        step = window.step + 1
        if self._due(step):
            with self.tracker.clock("evaluation"):
                done = self._evaluate(step, window.epoch)
            if not done:
                self.saver.last_step = -1  # interrupted: the resumed run evaluates this step

    def finish(self) -> dict[str, Any]:
        """Load the best adapter, if configured; return the evaluation fields of trainer_state.json.

        Raises UserError for a corrupt best checkpoint.
        """
        step, best = self.tracker.step, self.known["best_step"]
        if self.config.load_best_model_at_end and best not in (None, step):
            self._load_best(storage.folder_of(self.folder, best))
        return {
            "global_step": step,
            "epoch": round(step / self.layout.steps_per_epoch, 4),
            "best_metric": self.known["best_metric"],
            "best_step": best,
            "log_history": self.tracker.history,
        }

    def _load_best(self, folder: Path) -> None:
        """Load a checkpoint's adapter into the model on all ranks."""
        adapter = {}
        with raise_on_all_ranks():
            if self.accelerator.is_main_process:
                try:
                    adapter = load_file(storage.verify(folder).folder / storage.ADAPTER)
                except storage.CorruptCheckpoint as damage:
                    raise UserError(
                        f"--load_best_model_at_end: {folder}: damaged: {damage}. Give False to "
                        "save the last adapter instead."
                    ) from None
        print_rank0(f"saving the adapter with the lowest eval_loss: {folder.name}")
        adapter = optimizer_state.broadcast_tensors(adapter, self.accelerator.device)
        optimizer_state.load_trainable(self.accelerator.unwrap_model(self.model), adapter)

    def _forget_missing_best(self) -> None:
        """Forget the best checkpoint if its folder is gone and its adapter will be needed."""
        best = self.known["best_step"]
        if not self.config.load_best_model_at_end or best is None:
            return
        if not broadcast_flag(storage.folder_of(self.folder, best).is_dir()):
            self._print(
                f"note: checkpoint-{best}, the best so far, is missing in {self.folder}; the best "
                "of the remaining evaluations is kept instead"
            )
            self.known.update(best_metric=None, best_step=None, stale=0)

    def _print(self, line: str) -> None:
        """Print a line above the progress bar, on rank 0."""
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _due(self, step: int) -> bool:
        interval = self.layout.interval(self.config.eval_strategy, self.config.eval_steps)
        return self.evaluates and (step % interval == 0 or step == self.layout.total_steps)

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.known["stale"] >= patience

    def _evaluate(self, step: int, epoch: float) -> bool:
        """Evaluate and log the result; return False if a stop request interrupted it."""
        begun = time.perf_counter()
        with evaluating(self.model):
            sums = self._sums()
            rows = (
                None if sums is None else self.sampler.rows(self.model, step, self.saver.is_asked)
            )
        if sums is None or rows is None:
            return False
        self.known["evaluated_step"] = step
        if self.data.held_out:
            entry = {"step": step, "epoch": round(epoch, 4), **self._metrics(sums)}
            entry["eval_seconds"] = time.perf_counter() - begun
            self.tracker.add_evaluation(entry)
            self._track_best(step, entry["eval_loss"])
        if rows and self.accelerator.is_main_process:
            write_samples(self.folder, rows)
            self.tracker.add_samples(step, rows)
        return True

    def _sums(self) -> Tensor | None:
        """Return sums over all ranks [sources, ANSWER_POSITIONS, 3] float64; None after a stop.

        The last dimension is loss, correct tokens, tokens.
        """
        device, count = self.accelerator.device, len(self.data.eval_sources)
        sums = torch.zeros(count * ANSWER_POSITIONS, 3, dtype=torch.float64, device=device)
        for part, groups in self._micro_batches():
            if self.saver.is_asked():
                return None
            batch = self.data.collator(part.examples, 0, part.shared).to(device)
            losses, predicted = token_losses(self.model, batch, self.layout.chunk_tokens)
            correct = predicted == batch.targets
            values = torch.stack([losses, correct, torch.ones_like(losses)], 1).double()
            sums.index_add_(0, torch.tensor(groups, dtype=torch.int64, device=device), values)
        total: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total.reshape(count, ANSWER_POSITIONS, 3).cpu()

    def _micro_batches(self) -> Iterator[tuple[ExampleBatch, list[int]]]:
        """Yield this rank's micro-batches with the group of each supervised token.

        Every rank has the same number, since a pass may be a collective; some may be empty.
        """
        ranks = self.accelerator.num_processes
        held_out: Any = self.data.held_out or []
        size = MICRO_BATCHES_AT_ONCE * self.limits.examples * ranks
        turn, record = 0, -1
        for begin in range(0, len(held_out), size):
            chosen, groups = held_out[begin : begin + size], {}
            for example in chosen:
                turn = turn + 1 if example.record == record else 0
                record = example.record
                groups[id(example)] = self._groups(example, turn)
            assigned = assign_micro_batches(chosen, ranks, self.limits)
            for part in assigned.ranks[self.accelerator.process_index]:
                yield part, [group for e in part.examples for group in groups[id(e)]]

    def _groups(self, example: Example, pair: int) -> list[int]:
        """Return the group of each supervised token: its source and the position of its answer."""
        first = bisect_right(self.sources, example.record) * ANSWER_POSITIONS
        last = ANSWER_POSITIONS - 1
        if example.is_pair:
            return [first + min(pair, last)] * len(example.labels)
        runs = groupby(example.labels[1:], key=lambda label: label != IGNORE_INDEX)
        lengths = [len([*run]) for supervised, run in runs if supervised]
        positions = [[min(turn, last)] * length for turn, length in enumerate(lengths)]
        return [first + position for answer in positions for position in answer]

    def _metrics(self, sums: Tensor) -> dict[str, Any]:
        """Return a log entry's metrics from the result of `_sums`."""
        loss, correct, tokens = sums.sum((0, 1)).tolist()
        mean = loss / tokens
        metrics = {
            "eval_loss": mean if math.isfinite(mean) else None,
            "eval_perplexity": math.exp(mean) if mean < 700 else None,
            "eval_token_accuracy": correct / tokens,
            "eval_tokens": int(tokens),
        }
        names = [str(turn + 1) for turn in range(ANSWER_POSITIONS - 1)]
        names += [f"{ANSWER_POSITIONS} and later"]
        for kind, parts, labels in (
            ("source", sums.sum(1), self.data.eval_sources),
            ("turn", sums.sum(0), names),
        ):
            rows = zip(labels, parts.tolist(), strict=True)
            losses = {label: row[0] / row[2] for label, row in rows if row[2]}
            if len(losses) > 1 and metrics["eval_loss"] is not None:
                metrics[f"eval_loss_by_{kind}"] = losses
        return metrics

    def _track_best(self, step: int, loss: float | None) -> None:
        """Record the best evaluation; end the run after too many without a lower loss."""
        known = self.known
        if lr_at(step - 1, self.layout.total_steps, self.config) == 0.0:
            return  # The first warm-up step changes no weight.
        if loss is not None and (known["best_metric"] is None or loss < known["best_metric"]):
            known.update(best_metric=loss, best_step=step, stale=0)
            if self.config.load_best_model_at_end:
                self.saver.due_at = step
            return
        known["stale"] += 1
        if self._out_of_patience():
            self.saver.last_step = step
            self._print(
                f"step {step}: {known['stale']} evaluations without a lower eval_loss than at step "
                f"{known['best_step']}; the run ends (--early_stopping_patience)"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block without dropout and gradients; restore all modules' modes afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        # bitsandbytes 0.50's Linear4bit (nn/modules.py) stays in training mode: in eval mode on a
        # CPU it repacks its weight, which changes later products. The layer has no dropout.
        if any(hasattr(weight, "quant_state") for weight in module.parameters(recurse=False)):
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
