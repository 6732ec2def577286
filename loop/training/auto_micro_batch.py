"""Finds the largest micro-batch that fits in memory, by trial passes with the longest examples."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.errors import UserError
from loop.config.flags import Config
from loop.distributed.accelerator import zero_stage
from loop.distributed.layout import Layout
from loop.distributed.memory import memory_room, memory_used, micro_batch_record, proc_bytes
from loop.distributed.optimizer_state import forget_gradients
from loop.distributed.rank_zero import print_rank0
from loop.inputs.training_data import TrainingData
from loop.training.loss import supervised_loss_sum
from loop.training.optim import accumulating

TOKEN_MULTIPLE = 64  # the result is rounded down to a multiple of this
# Passes of one size under ZeRO-3. The first pass records the order of weights. Later passes keep
# and prefetch weights, which takes more memory (DeepSpeed 0.19.8,
# zero/partitioned_param_coordinator.py). On a CPU, gathering also fragments memory: SmolLM2-135M in
# fp32 on two ranks took 3.1 GiB in the first pass of 555 tokens and 3.6 GiB in the third
# (2026-11-26).
ZERO3_PASSES = 3


def fit_micro_batch(
    layout: Layout,
    config: Config,
    data: TrainingData,
    model: Any,
    accelerator: Accelerator,
    progress: dict[str, Any],
) -> Layout:
    """Return the layout with the largest token count per micro-batch that fits on every rank.

    Every rank must call this after `prepare`. Only then is the optimizer state in memory, and only
    then can ZeRO-3 run a pass. A resumed run keeps the token count of its checkpoint.
    Raises UserError if the longest example alone does not fit.
    """
    if not config.auto_micro_batch or data.base.alone:
        return layout
    each = -(-layout.global_batch_size // layout.world_size)
    saved = progress.get("auto_micro_batch") or {}
    tokens = saved.get("tokens", 0)
    if _any_rank(accelerator, saved != micro_batch_record(layout, config, accelerator, tokens)):
        tokens = max_tokens(model, data, layout.chunk_tokens, accelerator, each)
    if tokens == 0:
        error = UserError(
            "--auto_micro_batch: the longest example alone does not fit in memory. Give a smaller "
            "--model_max_length, or --gradient_checkpointing True, or --q_lora True."
        )
        error.known_to_all = True
        raise error
    limits = dataclasses.replace(layout.limits, examples=each, tokens=tokens)
    layout = dataclasses.replace(layout, micro_batch_size=each, accumulation=1, limits=limits)
    print_rank0(f"auto_micro_batch: {layout}")
    return layout


def max_tokens(
    model: Any, data: TrainingData, chunk_tokens: int, accelerator: Accelerator, max_examples: int
) -> int:
    """Return the number of tokens, with padding, that fit in a micro-batch; 0 if no example fits.

    The number of examples doubles while the extrapolated peak fits. The result is extrapolated from
    the last two peaks. All ranks try the same sizes. All stop when a size does not fit on one rank.
    """
    examples = data.examples.longest(max_examples)
    # No sharing: the longest examples may share a prefix that other examples lack.
    collate = dataclasses.replace(data.collator, sharing=False)
    if zero_stage(accelerator) == 3:
        # Allocate all that does not depend on the size before the free memory is read.
        shortest = collate(examples[-1:], 0).to(accelerator.device)
        _peak_of(model, shortest, chunk_tokens, accelerator)
    room, before = memory_room(accelerator.device), memory_used(accelerator.device)
    tried, peaks, count = [0], [before], 1
    while True:
        batch = collate(examples[:count], 0).to(accelerator.device)
        tokens = batch.tokens
        expected_peak = peaks[-1] + (tokens - tried[-1]) * _slope(tried, peaks)
        if _any_rank(accelerator, count > 1 and expected_peak > room):
            break
        peak = _peak_of(model, batch, chunk_tokens, accelerator)
        if _any_rank(accelerator, peak is None or peak > room):
            break
        tried, peaks = [*tried, tokens], [*peaks, peak or 0]
        if count == len(examples):
            break
        count = min(2 * count, len(examples))
    if len(tried) == 1:
        return 0
    estimate = tried[-1] + (room - peaks[-1]) / max(1.0, _slope(tried, peaks))
    # At most twice the last size: that did not fit, or exceeds a rank's share of a window.
    rounded = int(min(estimate, 2 * tried[-1])) // TOKEN_MULTIPLE * TOKEN_MULTIPLE
    return min(_gather_numbers(accelerator, max(tried[1], rounded)))


def _slope(tried: list[int], peaks: list[int]) -> float:
    """Return the bytes per additional token, from the last two trials."""
    if len(tried) < 2:
        return 0.0
    return (peaks[-1] - peaks[-2]) / max(1, tried[-1] - tried[-2])


def _peak_of(model: Any, batch: Any, chunk_tokens: int, accelerator: Accelerator) -> int | None:
    """Return the peak bytes of a forward and a backward pass; None if out of memory.

    Under ZeRO-3 it raises UserError instead of returning None: other ranks may wait in a collective
    of the pass, so this rank exits, and its launcher ends the others. To avoid this, all ranks
    extrapolate the peak of a size before they try the size. Only the first size, the longest
    example, has no extrapolation.
    """
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    try:
        for _ in range(ZERO3_PASSES if zero_stage(accelerator) == 3 else 1):
            _forward_backward(model, batch, chunk_tokens, accelerator)
    except (torch.OutOfMemoryError, MemoryError) as error:
        if zero_stage(accelerator) < 3:
            return None
        raise UserError(
            f"--auto_micro_batch: found too little memory for a micro-batch of {batch.tokens} "
            "tokens. Give --tokens_per_micro_batch with fewer instead of --auto_micro_batch. If "
            "one example has that many tokens, give a smaller --model_max_length, or "
            "--gradient_checkpointing True, or --q_lora True."
        ) from error
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return proc_bytes("/proc/self/status", "VmHWM")


def _forward_backward(model: Any, batch: Any, chunk_tokens: int, accelerator: Accelerator) -> None:
    """Run a forward and a backward pass that leaves no gradients.

    Training's random numbers do not change, since each micro-batch sets its own seed.
    """
    model.train()
    if zero_stage(accelerator) == 3:
        # As in training, but without an optimizer step. Checkpointing is reentrant under ZeRO-3
        # (loop/model/load.py), which does not work with torch.autograd.grad.
        with accumulating(accelerator, model, last=False):
            accelerator.backward(supervised_loss_sum(model, batch, chunk_tokens))
        forget_gradients(model)
        return
    # torch.autograd.grad accumulates no gradients, so the reduction hooks of DDP and DeepSpeed do
    # not run. Otherwise, ranks would wait for a rank that is out of memory.
    inner = getattr(model, "module", model)  # DistributedDataParallel, DeepSpeedEngine
    loss = supervised_loss_sum(inner, batch, chunk_tokens)
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)


def _any_rank(accelerator: Accelerator, mine: bool) -> bool:
    """Return whether `mine` is true on any rank; every rank must call this."""
    return any(_gather_numbers(accelerator, mine))


def _gather_numbers(accelerator: Accelerator, mine: int) -> list[int]:
    """Return the numbers of all ranks; every rank must call this."""
    return list(gather_object([mine])) if accelerator.num_processes > 1 else [mine]
