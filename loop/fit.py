"""Finds the largest micro-batch that fits in memory, by trying the longest examples first."""

import dataclasses
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.errors import UserError
from loop.config import Config
from loop.objective import supervised_loss_sum
from loop.prepare import Prepared
from loop.windows import Layout

SHARE = 0.9  # of the memory: the rest is for the optimizer, buckets and what is fragmented
STEP = 64  # tokens: so coarse is the answer


def fitted(
    layout: Layout,
    config: Config,
    prepared: Prepared,
    model: Any,
    accelerator: Accelerator,
    progress: dict[str, Any],
) -> Layout:
    """Return the layout with the most tokens a micro-batch may have; every rank must call this.

    Before `prepare`, when no collective is part of a pass yet: each rank tries for itself, and the
    least counts. A run that goes on keeps what it found. Not under ZeRO-3: loop/preflight.py.
    Raises UserError where the longest example alone does not fit.
    """
    if not config.auto_micro_batch:
        return layout
    each = -(-layout.global_batch_size // layout.world_size)
    known = progress.get("auto_micro_batch") or {}
    least = known.get("tokens", 0)
    if known != found(layout, config, accelerator, least):
        mine = most_tokens(model, prepared, config, accelerator, each)
        least = min(gather_object([mine]) if accelerator.num_processes > 1 else [mine])
    if least == 0:
        raise UserError(
            "--auto_micro_batch: the longest example alone does not fit in memory. Give a smaller "
            "--model_max_length, or --gradient_checkpointing True, or --q_lora True."
        )
    limits = dataclasses.replace(layout.limits, examples=each, tokens=least)
    layout = dataclasses.replace(layout, micro_batch_size=each, accumulation=1, limits=limits)
    accelerator.print(f"auto_micro_batch: {layout}")
    return layout


def found(
    layout: Layout, config: Config, accelerator: Accelerator, tokens: int | None = None
) -> dict[str, int] | None:
    """Return what a checkpoint keeps of it: it holds on as many ranks with as much memory."""
    if not config.auto_micro_batch:
        return None
    device = accelerator.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = _meminfo("/proc/meminfo", "MemTotal")
    tokens = layout.limits.tokens if tokens is None else tokens
    return {"tokens": tokens or 0, "ranks": layout.world_size, "memory": memory}


def most_tokens(
    model: Any, prepared: Prepared, config: Config, accelerator: Accelerator, most: int
) -> int:
    """Return how many tokens, padding counted, fit in a micro-batch; 0 where no example does.

    The memory that a pass takes grows with its tokens: twice as many examples are tried while they
    will fit by what was seen so far, and what is left is reckoned from the last two.
    """
    examples = prepared.examples.longest(most)
    room, before = memory_room(accelerator.device), memory_used(accelerator.device)
    tried, peaks, count = [0], [before], 1
    while True:
        batch = prepared.collator(examples[:count], 0).to(accelerator.device)
        tokens = batch.tokens
        reckoned = peaks[-1] + (tokens - tried[-1]) * _slope(tried, peaks)
        if count > 1 and reckoned > room:
            break
        peak = _peak_of(model, batch, config, accelerator)
        if peak is None or peak > room:
            break
        tried, peaks = [*tried, tokens], [*peaks, peak]
        if count == len(examples):
            break
        count = min(2 * count, len(examples))
    if len(tried) == 1:
        return 0
    reckoned = tried[-1] + (room - peaks[-1]) / max(1.0, _slope(tried, peaks))
    # Nothing beyond the next size, which did not fit or is more than a window has.
    return max(tried[1], int(min(reckoned, 2 * tried[-1])) // STEP * STEP)


def memory_room(device: torch.device) -> int:
    """Return the bytes that this rank may hold, with what it holds already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(SHARE * (free + torch.cuda.memory_reserved(device)))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = _meminfo("/proc/meminfo", "MemAvailable") // ranks
    with suppress(OSError, ValueError):  # A container may have less than its machine.
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()) // ranks)
    return int(SHARE * (available + memory_used(device)))


def memory_used(device: torch.device) -> int:
    """Return the bytes that this process holds now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _meminfo("/proc/self/status", "VmRSS")


def _slope(tried: list[int], peaks: list[int]) -> float:
    """Return the bytes that one token more takes, by the last two trials."""
    if len(tried) < 2:
        return 0.0
    return (peaks[-1] - peaks[-2]) / max(1, tried[-1] - tried[-2])


def _peak_of(model: Any, batch: Any, config: Config, accelerator: Accelerator) -> int | None:
    """Return the most bytes held in a forward and a backward pass; None where they do not fit."""
    device = accelerator.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model.train()
    try:
        with accelerator.autocast():
            loss = supervised_loss_sum(model, batch, config.loss_chunk_tokens)
        loss.backward()  # type: ignore[no-untyped-call]
    except (torch.OutOfMemoryError, MemoryError):
        return None
    finally:
        model.zero_grad(set_to_none=True)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _meminfo("/proc/self/status", "VmHWM")


def _meminfo(file: str, name: str) -> int:
    """Return the bytes that a file of /proc says in kB."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{file}: no {name}")
