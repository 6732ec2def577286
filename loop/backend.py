"""Builds the Accelerator: device, precision, accumulation, DeepSpeed; meets the other ranks."""

import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from data.errors import UserError
from loop.config import Config, decisive
from loop.windows import Layout
from loop.zero import complete, launch_facts, precision_of, zero_settings

# Of any collective: longer than a rank may be behind while each reads data and model for itself.
PATIENCE = datetime.timedelta(minutes=30)


def join_ranks() -> PartialState:
    """Meet the other ranks in a process group.

    Raises UserError for more ranks than GPUs, which could not even meet.
    """
    if not _on_gpu():
        _prepare_cpu()
        # Without `cpu`, accelerate 1.15 sees one process under a DeepSpeed config (state.py).
        return PartialState(cpu=True, timeout=PATIENCE)
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if ranks > gpus:
        error = UserError(
            f"found {ranks} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}; expected one GPU "
            f"each. Give --num_processes {gpus} (launch.sh: NUM_PROCESSES={gpus})."
        )
        error.known_to_all = os.environ.get("WORLD_SIZE") == str(ranks)  # one machine
        raise error
    return PartialState(timeout=PATIENCE)


def check_launch(config: Config) -> None:
    """Check the launch and the flags against the hardware, before anything is loaded.

    Raises UserError for what cannot work, naming what does.
    """
    for name in ("FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise UserError(
                f"found an accelerate config with {name}; expected DeepSpeed, DDP or one process. "
                "To share the base model out over the ranks: accelerate_configs/zero3.yaml."
            )
    _adopt_precision(zero_settings(config), config)
    if _on_gpu():
        _check_gpu(config)
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    else:
        _check_cpu(config)


def build_accelerator(config: Config, layout: Layout) -> Accelerator:
    """Return the Accelerator for this launch; DeepSpeed gets the loop's own values.

    Raises UserError for a DeepSpeed file that contradicts a flag.
    """
    asked = zero_settings(config)
    plugin = None
    if asked:
        with told_to_all():
            values = complete(asked, config, layout)
        # It would look for contradictions of its own, and tell them with a trace.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=_stage(values) == 3)
    return Accelerator(
        mixed_precision=config.precision,
        deepspeed_plugin=plugin,
        # The default, True, ends an accumulation with the data loader; windows end it here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=layout.accumulation, sync_with_dataloader=False
        ),
    )


@contextmanager
def told_to_all() -> Iterator[None]:
    """Turn a mistake that any rank meets into one that all ranks raise, so that none waits.

    A machine may lack a file that the others have. Nothing in the block may be a collective.
    """
    ranks, mistake = PartialState(), None
    try:
        yield
    except UserError as found_here:
        mistake = str(found_here)
    told = [mistake and (ranks.process_index, platform.node(), mistake)]
    if ranks.num_processes > 1:
        told = gather_object(told)
    found = [report for report in told if report]
    if found:
        rank, machine, mistake = found[0]
        alone = len(found) < len(told)
        told_error = UserError(
            f"on rank {rank}, machine {machine}: {mistake}" if alone else mistake
        )
        told_error.known_to_all = True
        raise told_error


def check_agreement(config: Config, facts: dict[str, Any]) -> None:
    """Make sure that all ranks hold the same facts, launch and settings; every rank must call this.

    Raises UserError: with other data or settings on one machine the gradient would be wrong, and
    with another backend the ranks would wait for each other in different collectives.
    """
    facts = {**facts, **launch_facts(config), **decisive(config)}
    everyone = gather_object([facts]) if PartialState().num_processes > 1 else [facts]
    with told_to_all():
        for rank, theirs in enumerate(everyone):
            for key in {**everyone[0], **theirs}:
                # Of DeepSpeed's values one machine may have what the other leaves open.
                first, other = everyone[0].get(key, "not set"), theirs.get(key, "not set")
                if first != other:
                    raise UserError(
                        f"{key} is {first} on rank 0 and {other} on rank {rank}; expected the "
                        "same. Give every machine the same files and flags."
                    )


def first_rank_says(answer: bool) -> bool:
    """Return the first rank's answer on every rank."""
    return bool(broadcast_object_list([answer])[0])


def zero_stage(accelerator: Accelerator) -> int:
    """Return the ZeRO stage, 0 without DeepSpeed; from 3 on, parameters are shared out."""
    plugin = accelerator.state.deepspeed_plugin
    return _stage(plugin.deepspeed_config) if plugin else 0


def _stage(values: dict[str, Any]) -> int:
    return int(values["zero_optimization"]["stage"])


def _adopt_precision(asked: dict[str, Any], config: Config) -> None:
    """Let a DeepSpeed file decide the precision where neither flags nor launcher do."""
    variable = "ACCELERATE_MIXED_PRECISION"
    silent = config.mixed_precision is None and not config.bf16 and not config.fp16
    found = precision_of(asked)
    if found and silent and os.environ.get(variable, "no") == "no":
        os.environ[variable] = found


def _on_gpu() -> bool:
    # cpu.yaml on a machine with a GPU: the launcher only says so, CUDA stays visible.
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def _check_gpu(config: Config) -> None:
    if config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"found precision bf16 on {torch.cuda.get_device_name()}, which lacks it. "
            "Give --mixed_precision fp16, or no."
        )


def _check_cpu(config: Config) -> None:
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


def _prepare_cpu() -> None:
    # `accelerate launch` exports OMP_NUM_THREADS=1 when the user set nothing (accelerate 1.15,
    # commands/launch.py): that would leave all cores but one idle.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU


def _multiplies_bf16() -> bool:
    """Whether the CPU says so; true where it says nothing (not x86, not Linux)."""
    try:
        features = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    return "sse2" not in features or "avx512_bf16" in features or "amx_bf16" in features
