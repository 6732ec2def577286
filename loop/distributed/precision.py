"""Resolves `--mixed_precision auto` by a measurement, and warns of CPUs that are slow in bf16."""

import dataclasses
import time
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from loop.config.flags import Config
from loop.config.model_flags import Precision

# Speed of bf16 matrix products relative to fp32. Below it, bf16 spends on casts what it saves on
# products.
MIN_BF16_SPEEDUP = 1.3


def resolve_precision(config: Config) -> Config:
    """Return the settings with rank 0's choice for `mixed_precision: auto`.

    A precision recorded in the output folder is kept, so a resumed run does not change it. Every
    rank must call this.
    """
    if config.mixed_precision != "auto" or config.bf16 or config.fp16:
        return config
    found = ("", "")
    if PartialState().is_main_process:
        recorded = _recorded_precision(Path(config.output_dir) / "training_config.yaml")
        found = (recorded, "as recorded in the output folder") if recorded else _faster_precision()
        print(f"precision: {found[0].replace('no', 'fp32')}, {found[1]}")
    precision = broadcast_object_list([found[0]])[0]
    return dataclasses.replace(config, mixed_precision=precision)


def with_recorded_precision(config: Config) -> Config:
    """Return the settings with the output folder's precision for `auto`, if one is recorded."""
    if config.mixed_precision != "auto" or config.bf16 or config.fp16:
        return config
    recorded = _recorded_precision(Path(config.output_dir) / "training_config.yaml")
    return dataclasses.replace(config, mixed_precision=recorded) if recorded else config


def on_gpu() -> bool:
    """Return whether the ranks run on GPUs."""
    # On a GPU machine, cpu.yaml only makes the launcher set this variable: CUDA stays visible.
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def slow_in_bf16(config: Config) -> str:
    """Return a note if this CPU is slow in the run's precision, else an empty string."""
    if config.precision != "bf16" or on_gpu() or _multiplies_bf16():
        return ""
    return "this CPU has no bf16 instructions: --mixed_precision no is faster here"


def _recorded_precision(file: Path) -> Precision | None:
    """Return the precision of the run in this folder, if there is one."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = settings.get("mixed_precision") if isinstance(settings, dict) else None
    return found if found in ("no", "bf16", "fp16") else None


def _faster_precision() -> tuple[str, str]:
    """Return the faster precision, "bf16" or "no", and the reason."""
    if on_gpu():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "which this GPU supports"
        return "no", "as this GPU has no bf16 instructions"
    ratio = bf16_speedup() if _multiplies_bf16() else 0.0
    if not ratio:
        return "no", "as this CPU has no bf16 instructions"
    reason = f"as bf16 matrix products are {ratio:.1f} x as fast here as fp32's"
    return ("bf16" if ratio >= MIN_BF16_SPEEDUP else "no"), reason


def bf16_speedup(tokens: int = 256, width: int = 576, inner: int = 1536) -> float:
    """Return the speed of bf16 matrix products relative to fp32, on one core.

    The shapes are those of an MLP layer of SmolLM2-135M. The CPU time of one thread is compared:
    other processes hardly change it. The measurement takes about 0.1 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for attempt in range(8):
        for dtype in seconds:
            left, right = torch.ones(tokens, width).to(dtype), torch.ones(width, inner).to(dtype)
            start = time.thread_time()
            torch.mm(left, right)
            if attempt:  # The first product of a dtype builds its kernel.
                seconds[dtype] = min(seconds[dtype], time.thread_time() - start)
    torch.set_num_threads(threads)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _multiplies_bf16() -> bool:
    """Return whether the CPU has bf16 instructions; True if unknown (not x86, not Linux)."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "sse2" not in features or "avx512_bf16" in features or "amx_bf16" in features
