"""Builds the Accelerator: device, precision, accumulation, and the values DeepSpeed must hold."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env

from data.errors import UserError
from loop.config import Config
from loop.windows import Layout


def build_accelerator(config: Config, layout: Layout) -> Accelerator:
    """Return the Accelerator for this launch; the process group exists from here on.

    Raises UserError for a precision that the hardware lacks.
    """
    # cpu.yaml on a machine with a GPU: the launcher only says so, CUDA stays visible.
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        _check_gpu_precision(config)
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    else:
        _prepare_cpu(config)
    accelerator = Accelerator(
        mixed_precision=config.precision,
        # The default, True, ends an accumulation with the data loader; windows end it here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=layout.accumulation, sync_with_dataloader=False
        ),
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _fill_deepspeed_config(accelerator, config, layout)
    return accelerator


def uses_zero3(accelerator: Accelerator) -> bool:
    """Whether parameters are partitioned over the ranks."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _prepare_cpu(config: Config) -> None:
    if config.precision == "fp16":
        raise UserError(
            "found precision fp16 on a machine without a GPU; expected bf16 or no: fp16 needs loss "
            "scaling, which PyTorch has for GPUs only. Give --mixed_precision bf16."
        )
    if config.flash_attn:
        raise UserError("--flash_attn: found no GPU, which FlashAttention-2 needs. Leave it out.")
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if config.precision == "bf16" and first and not _multiplies_bf16():
        print("note: this CPU has no bf16 instructions: --mixed_precision no is faster here")
    # `accelerate launch` exports OMP_NUM_THREADS=1 when the user set nothing (accelerate 1.15,
    # commands/launch.py): that would leave all cores but one idle.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    # Without this, accelerate 1.15 sees one process under a DeepSpeed config (state.py).
    PartialState(cpu=True)


def _multiplies_bf16() -> bool:
    """Whether the CPU says so; true where it says nothing (not x86, not Linux)."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "sse2" not in features or "avx512_bf16" in features or "amx_bf16" in features


def _check_gpu_precision(config: Config) -> None:
    if config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"found precision bf16 on {torch.cuda.get_device_name()}, which lacks it. "
            "Give --mixed_precision fp16, or no."
        )


def _fill_deepspeed_config(accelerator: Accelerator, config: Config, layout: Layout) -> None:
    """Write the loop's own values, which DeepSpeed would otherwise guess or override."""
    values = accelerator.state.deepspeed_plugin.deepspeed_config
    values["train_micro_batch_size_per_gpu"] = layout.micro_batch_size
    values["gradient_accumulation_steps"] = layout.accumulation
    # "auto" would become the constant 1.0 (accelerate 1.15, accelerator.py, _prepare_deepspeed).
    values["gradient_clipping"] = config.max_grad_norm
    values["steps_per_print"] = float("inf")
    if config.precision == "bf16":
        # In bf16 a sum over micro-batches would round at each of them.
        values["data_types"] = {"grad_accum_dtype": "fp32"}
