"""What the doctor says of the machine: hardware, and the launch on it."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from loop.backend import on_gpu
from loop.config import Config
from loop.fit import memory_room
from loop.launches import Launch
from loop.sections import GIB


def hardware_rows(launch: Launch) -> list[tuple[str, str]]:
    """Return what a run finds here, and what one rank may hold."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    rows = [("CPU", f"{_processor()}, {cores} cores, {memory:.1f} GiB of memory")]
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    for name in dict.fromkeys(gpu.name for gpu in gpus):
        alike = [gpu for gpu in gpus if gpu.name == name]
        of = f"{alike[0].total_memory / GIB:.1f} GiB, compute capability {alike[0].major}."
        rows.append(("GPU", f"{len(alike)} x {name}, {of}{alike[0].minor}"))
    rows += [] if gpus else [("GPU", "none")]
    device = "GPU" if on_gpu() else "main memory"
    room = f"{room_of_a_rank() / GIB:.1f} GiB of {device}, 90 % of what is free"
    return [*rows, ("a rank may hold", room + (", shared alike" if launch.ranks > 1 else ""))]


def room_of_a_rank() -> int:
    """Return the bytes that each rank may hold on its device; of GPUs that of the fullest."""
    if not on_gpu():
        return memory_room(torch.device("cpu"))
    return min(memory_room(torch.device("cuda", n)) for n in range(torch.cuda.device_count()))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def launch_rows(launch: Launch, asked: dict[str, Any], config: Config) -> list[tuple[str, str]]:
    """Return which backend runs, on how many ranks, and in which precision."""
    zero: dict[str, Any] = asked.get("zero_optimization", {})
    backend = f"DeepSpeed ZeRO-{zero['stage']}" if zero else "DDP" if launch.several else "alone"
    if not zero and launch.told.get("ACCELERATE_USE_DEEPSPEED") == "true":
        backend = "DeepSpeed, its ZeRO stage not known: see below"
    for what in ("optimizer", "param") if zero else ():
        device = (zero.get(f"offload_{what}") or {}).get("device", "none")
        backend += f", {what} on the {device}" if device != "none" else ""
    machines = f" on {launch.machines} machines" if launch.machines > 1 else ""
    ranks = f"{launch.ranks} rank{'s' * (launch.ranks > 1)}{machines}"
    flags = config.mixed_precision or config.bf16 or config.fp16
    source = "the run's settings" if flags else "the accelerate config"
    precision = f"{config.precision.replace('no', 'fp32')}, by {source}"
    if config.mixed_precision == "auto":
        precision = "auto: decided when the run starts; fp32 assumed here"
    rows = [
        ("launch", f"{launch.name}: {backend}; {ranks}"),
        ("precision", precision),
    ]
    if config.deepspeed:
        rows.append(("DeepSpeed JSON", config.deepspeed))
    return rows
