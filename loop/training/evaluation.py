"""Evaluates while training runs: loss on what is held out, samples, the best, and when to end."""

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

TURNS = 8  # answers of a dialogue that are told apart; the last stands for all later ones, too
AHEAD = 16  # micro-batches of a rank that are dealt at once


class Evaluator:
    """Evaluates where it is due, between two steps; training goes on as if it had not been.

    Every rank must call its methods, after the same steps.
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
        size = config.per_device_eval_batch_size or layout.limits.examples
        self.limits = replace(layout.limits, examples=size, finer=False)
        # The places, among the dialogues read, behind the last one of each source.
        held_out = data.held_out
        self.sources = [*accumulate(held_out.tally.sources)] if held_out else []
        prompts = read_prompts(config, accelerator)
        self.sampler = Sampler(data, config, accelerator, prompts, size)
        self.evaluates = config.eval_strategy != "no" and bool(data.held_out or prompts)

    def begin(self) -> None:
        """Put the model into training mode; first make up for what a stop has cut off."""
        self.model.train()
        start, main = self.tracker.prior, self.accelerator.is_main_process
        if self.sampler.prompts and main:
            kept = history_until(self.folder / FILE if start.step else None, start.step)
            write_samples(self.folder, kept, afresh=True)
        self._forget_lost()
        owed = start.step and self._due(start.step)
        if owed and self.known["evaluated_step"] != start.step:
            done = self._evaluate(start.step, start.progress["epoch"])
            if not done:
                self.saver.stop(start.step)

    def until_early_stop(self, dealt: Iterator[Window]) -> Iterator[Window]:
        """Yield the windows, up to where patience is over."""
        while not self._is_enough() and (window := next(dealt, None)) is not None:
            yield window

    def maybe_evaluate(self, window: Window) -> None:
        """Evaluate where it is due; a stop that is asked for meanwhile is met by the saver."""
        step = window.step + 1
        if self._due(step):
            with self.tracker.clock("evaluation"):
                done = self._evaluate(step, window.epoch)
            if not done:
                self.saver.last_step = (
                    -1
                )  # The run is not over: this is made up for when it goes on.

    def finish(self) -> dict[str, Any]:
        """Return what trainer_state.json tells; the best weights are in the model, if asked for.

        Raises UserError where the best checkpoint is not as it was written.
        """
        step, best = self.tracker.step, self.known["best_step"]
        if self.config.load_best_model_at_end and best not in (None, step):
            self._put_best(storage.folder_of(self.folder, best))
        return {
            "global_step": step,
            "epoch": round(step / self.layout.steps_per_epoch, 4),
            "best_metric": self.known["best_metric"],
            "best_step": best,
            "log_history": self.tracker.history,
        }

    def _put_best(self, folder: Path) -> None:
        adapter = {}
        with raise_on_all_ranks():
            if self.accelerator.is_main_process:
                try:
                    adapter = load_file(storage.verify(folder).folder / storage.ADAPTER)
                except storage.CorruptCheckpoint as damage:
                    raise UserError(
                        f"--load_best_model_at_end: {folder}: damaged: {damage}. Give "
                        "False: the last adapter is saved then."
                    ) from None
        print_rank0(f"the best evaluation's adapter is saved: {folder.name}")
        adapter = optimizer_state.broadcast_tensors(adapter, self.accelerator.device)
        optimizer_state.load_trainable(self.accelerator.unwrap_model(self.model), adapter)

    def _forget_lost(self) -> None:
        """Have a best checkpoint that is not here, with an adapter to be saved, not count."""
        best = self.known["best_step"]
        if not self.config.load_best_model_at_end or best is None:
            return
        if not broadcast_flag(storage.folder_of(self.folder, best).is_dir()):
            self._tell(
                f"note: checkpoint-{best}, the best so far, is not in {self.folder}; the best of "
                "the evaluations from here on is kept"
            )
            self.known.update(best_metric=None, best_step=None, stale=0)

    def _tell(self, line: str) -> None:
        """Print a line above the bar; on the first rank."""
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _due(self, step: int) -> bool:
        interval = self.layout.interval(self.config.eval_strategy, self.config.eval_steps)
        return self.evaluates and (step % interval == 0 or step == self.layout.total_steps)

    def _is_enough(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.known["stale"] >= patience

    def _evaluate(self, step: int, epoch: float) -> bool:
        """Evaluate and tell; False where a stop was asked for before it was done."""
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
            entry = {"step": step, "epoch": round(epoch, 4), **self._figures(sums)}
            entry["eval_seconds"] = time.perf_counter() - begun
            self.tracker.add_evaluation(entry)
            self._judge(step, entry["eval_loss"])
        if rows and self.accelerator.is_main_process:
            write_samples(self.folder, rows)
            self.tracker.add_samples(step, rows)
        return True

    def _sums(self) -> Tensor | None:
        """Return sums over all ranks [sources, TURNS, 3] float64: loss, right tokens, tokens."""
        device, count = self.accelerator.device, len(self.data.eval_sources)
        sums = torch.zeros(count * TURNS, 3, dtype=torch.float64, device=device)
        for part, groups in self._parts():
            if self.saver.is_asked():
                return None
            batch = self.data.collator(part.examples, 0, part.groups).to(device)
            losses, predicted = token_losses(self.model, batch, self.config.loss_chunk_tokens)
            right = predicted == batch.targets
            values = torch.stack([losses, right, torch.ones_like(losses)], 1).double()
            sums.index_add_(0, torch.tensor(groups, dtype=torch.int64, device=device), values)
        total: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total.reshape(count, TURNS, 3).cpu()

    def _parts(self) -> Iterator[tuple[ExampleBatch, list[int]]]:
        """Yield this rank's micro-batches with the group of each supervised token.

        As many on each rank, some perhaps empty, so that no rank waits for another one.
        """
        ranks = self.accelerator.num_processes
        held_out: Any = self.data.held_out or []
        size = AHEAD * self.limits.examples * ranks
        turn, record = 0, -1
        for begin in range(0, len(held_out), size):
            chosen, groups = held_out[begin : begin + size], {}
            for example in chosen:
                turn = turn + 1 if example.record == record else 0
                record = example.record
                groups[id(example)] = self._groups(example, turn)
            for part in assign_micro_batches(chosen, ranks, self.limits).ranks[
                self.accelerator.process_index
            ]:
                yield part, [group for e in part.examples for group in groups[id(e)]]

    def _groups(self, example: Example, pair: int) -> list[int]:
        """Return the group of each supervised token: its source, and which answer it is part of."""
        first = bisect_right(self.sources, example.record) * TURNS
        if example.is_pair:
            return [first + min(pair, TURNS - 1)] * len(example.labels)
        runs = groupby(example.labels[1:], key=lambda label: label != IGNORE_INDEX)
        lengths = [len([*run]) for supervised, run in runs if supervised]
        turns = [[min(turn, TURNS - 1)] * length for turn, length in enumerate(lengths)]
        return [first + turn for some in turns for turn in some]

    def _figures(self, sums: Tensor) -> dict[str, Any]:
        loss, right, tokens = sums.sum((0, 1)).tolist()
        mean = loss / tokens
        figures = {
            "eval_loss": mean if math.isfinite(mean) else None,
            "eval_perplexity": math.exp(mean) if mean < 700 else None,
            "eval_token_accuracy": right / tokens,
            "eval_tokens": int(tokens),
        }
        names = [str(turn + 1) for turn in range(TURNS - 1)] + [f"{TURNS} and later"]
        for what, parts, labels in (
            ("source", sums.sum(1), self.data.eval_sources),
            ("turn", sums.sum(0), names),
        ):
            rows = zip(labels, parts.tolist(), strict=True)
            found = {label: row[0] / row[2] for label, row in rows if row[2]}
            if len(found) > 1 and figures["eval_loss"] is not None:
                figures[f"eval_loss_by_{what}"] = found
        return figures

    def _judge(self, step: int, loss: float | None) -> None:
        """Keep the best, and end the run where patience is over."""
        known = self.known
        if lr_at(step - 1, self.layout.total_steps, self.config) == 0.0:
            return  # The warm-up's first step: nothing was learnt yet that could be saved.
        if loss is not None and (known["best_metric"] is None or loss < known["best_metric"]):
            known.update(best_metric=loss, best_step=step, stale=0)
            if self.config.load_best_model_at_end:
                self.saver.due_at = step
            return
        known["stale"] += 1
        if self._is_enough():
            self.saver.last_step = step
            self._tell(
                f"step {step}: {known['stale']} evaluations without a lesser eval_loss than step "
                f"{known['best_step']}'s: the run ends here, as --early_stopping_patience says"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have the model without dropout and gradients, and then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        # bitsandbytes 0.50 (nn/modules.py, Linear4bit) packs a weight anew where it is in eval mode
        # on a CPU, and training would go on with other products. It has no dropout.
        if any(hasattr(weight, "quant_state") for weight in module.parameters(recurse=False)):
            module.training = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
