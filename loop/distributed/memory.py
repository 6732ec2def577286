"""The memory of one rank: bytes that it uses, and bytes that it may use."""

import os
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from loop.config.flags import Config
from loop.distributed.layout import Layout

# Share of the free memory that a rank may use. The rest is for gradient buckets, gradients of
# earlier micro-batches, the optimizer step and fragmentation.
MEMORY_SHARE = 0.9


def memory_room(device: torch.device) -> int:
    """Return the bytes that this rank may use, including those in use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(MEMORY_SHARE * (free + torch.cuda.memory_reserved(device)))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    available = proc_bytes("/proc/meminfo", "MemAvailable") // ranks
    with suppress(OSError, ValueError):  # A container may have less memory than its machine.
        available = min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()) // ranks)
    return int(MEMORY_SHARE * (available + memory_used(device)))


def memory_used(device: torch.device) -> int:
    """Return the bytes that this process uses."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return proc_bytes("/proc/self/status", "VmRSS")


def micro_batch_record(
    layout: Layout, config: Config, accelerator: Accelerator, tokens: int | None = None
) -> dict[str, int] | None:
    """Return the result of --auto_micro_batch for a checkpoint; None without that flag.

    A resumed run reuses it if the number of ranks and their memory are the same.
    """
    if not config.auto_micro_batch:
        return None
    device = accelerator.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = proc_bytes("/proc/meminfo", "MemTotal")
    tokens = layout.limits.tokens if tokens is None else tokens
    return {"tokens": tokens or 0, "ranks": layout.world_size, "memory": memory}


def proc_bytes(file: str, name: str) -> int:
    """Return a value of a /proc file, converted from kB to bytes."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{file}: no {name}")
