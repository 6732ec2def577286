"""Finds the largest micro-batch that fits in memory, by trying the longest examples first."""

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

STEP = 64  # tokens: so coarse is the answer
# Under ZeRO-3 a run's first pass records in which order weights are needed; only later ones keep
# them and fetch them ahead (DeepSpeed 0.19.8, zero/partitioned_param_coordinator.py). On a CPU what
# is gathered and let go leaves gaps as well: of SmolLM2-135M in fp32 on two ranks, 555 tokens took
# 3.1 GiB in their first pass and 3.6 in the third (2026-11-26).
REPEATED = 3


def fit_micro_batch(
    layout: Layout,
    config: Config,
    data: TrainingData,
    model: Any,
    accelerator: Accelerator,
    progress: dict[str, Any],
) -> Layout:
    """Return the layout with the most tokens a micro-batch may have; every rank must call this.

    After `prepare`, with the optimizer's state in memory, and because under ZeRO-3 no pass can be
    made before. The least of all ranks counts. A run that goes on keeps what it found.
    Raises UserError where the longest example alone does not fit.
    """
    if not config.auto_micro_batch:
        return layout
    each = -(-layout.global_batch_size // layout.world_size)
    known = progress.get("auto_micro_batch") or {}
    least = known.get("tokens", 0)
    if _any_rank(accelerator, known != micro_batch_record(layout, config, accelerator, least)):
        least = most_tokens(model, data, config, accelerator, each)
    if least == 0:
        error = UserError(
            "--auto_micro_batch: the longest example alone does not fit in memory. Give a smaller "
            "--model_max_length, or --gradient_checkpointing True, or --q_lora True."
        )
        error.known_to_all = True
        raise error
    limits = dataclasses.replace(layout.limits, examples=each, tokens=least)
    layout = dataclasses.replace(layout, micro_batch_size=each, accumulation=1, limits=limits)
    print_rank0(f"auto_micro_batch: {layout}")
    return layout


def most_tokens(
    model: Any, data: TrainingData, config: Config, accelerator: Accelerator, most: int
) -> int:
    """Return how many tokens, padding counted, fit in a micro-batch; 0 where no example does.

    The memory that a pass takes grows with its tokens: twice as many examples are tried while they
    will fit by what was seen so far, and what is left is reckoned from the last two. All ranks try
    the same, and none goes on where it would not fit on another.
    """
    examples = data.examples.longest(most)
    # What the longest begin with alike, others may not.
    collate = dataclasses.replace(data.collator, sharing=False)
    if zero_stage(accelerator) == 3:
        # What all sizes take alike is taken before the room is looked at.
        shortest = collate(examples[-1:], 0).to(accelerator.device)
        _peak_of(model, shortest, config, accelerator)
    room, before = memory_room(accelerator.device), memory_used(accelerator.device)
    tried, peaks, count = [0], [before], 1
    while True:
        batch = collate(examples[:count], 0).to(accelerator.device)
        tokens = batch.tokens
        reckoned = peaks[-1] + (tokens - tried[-1]) * _slope(tried, peaks)
        if _any_rank(accelerator, count > 1 and reckoned > room):
            break
        peak = _peak_of(model, batch, config, accelerator)
        if _any_rank(accelerator, peak is None or peak > room):
            break
        tried, peaks = [*tried, tokens], [*peaks, peak or 0]
        if count == len(examples):
            break
        count = min(2 * count, len(examples))
    if len(tried) == 1:
        return 0
    reckoned = tried[-1] + (room - peaks[-1]) / max(1.0, _slope(tried, peaks))
    # Nothing beyond the next size, which did not fit or is more than a window has.
    mine = max(tried[1], int(min(reckoned, 2 * tried[-1])) // STEP * STEP)
    return min(_of_all_ranks(accelerator, mine))


def _slope(tried: list[int], peaks: list[int]) -> float:
    """Return the bytes that one token more takes, by the last two trials."""
    if len(tried) < 2:
        return 0.0
    return (peaks[-1] - peaks[-2]) / max(1, tried[-1] - tried[-2])


def _peak_of(model: Any, batch: Any, config: Config, accelerator: Accelerator) -> int | None:
    """Return the most bytes held in a forward and a backward pass; None where they do not fit.

    Raises UserError where they do not under ZeRO-3: others may wait within the pass, in a
    collective that this rank no longer comes to, and cannot be told. It leaves, and its launcher
    ends them. So every rank reckons a size before one of them tries it, all but the longest
    example's, before which there is nothing to reckon by.
    """
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    try:
        for _ in range(REPEATED if zero_stage(accelerator) == 3 else 1):
            _pass(model, batch, config, accelerator)
    except (torch.OutOfMemoryError, MemoryError) as error:
        if zero_stage(accelerator) < 3:
            return None
        raise UserError(
            f"--auto_micro_batch: found too little memory for a micro-batch of {batch.tokens} "
            "tokens, which was tried. Give --tokens_per_micro_batch with fewer in its place; where "
            "one example has so many, a smaller --model_max_length, or --gradient_checkpointing "
            "True, or --q_lora True."
        ) from error
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return proc_bytes("/proc/self/status", "VmHWM")


def _pass(model: Any, batch: Any, config: Config, accelerator: Accelerator) -> None:
    """Make a forward and a backward pass that leaves no gradient behind; it seeds itself."""
    model.train()
    if zero_stage(accelerator) == 3:
        # As in training, short of the step: what recomputes is reentrant there (load.py), and
        # takes no other way back.
        with accumulating(accelerator, model, last=False):
            accelerator.backward(supervised_loss_sum(model, batch, config.loss_chunk_tokens))
        forget_gradients(model)
        return
    # Gradients that are returned are not summed up: hooks of DDP and DeepSpeed, which would reduce
    # them, are not called, and a rank that runs out of memory leaves none waiting.
    inner = getattr(model, "module", model)  # DistributedDataParallel, DeepSpeedEngine
    loss = supervised_loss_sum(inner, batch, config.loss_chunk_tokens)
    trained = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)


def _any_rank(accelerator: Accelerator, mine: bool) -> bool:
    """Return whether it is so on any rank; every rank must call this."""
    return any(_of_all_ranks(accelerator, mine))


def _of_all_ranks(accelerator: Accelerator, mine: int) -> list[int]:
    return list(gather_object([mine])) if accelerator.num_processes > 1 else [mine]
