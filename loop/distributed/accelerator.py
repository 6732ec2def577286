"""Starts the process group, checks the launch and builds the Accelerator."""

import datetime
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch.distributed import PrefixStore, init_process_group  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from data.errors import UserError, add_errors, collect_errors
from loop.config.flags import Config, rank_shared_settings
from loop.config.preflight import problems, together
from loop.distributed.deepspeed_config import (
    against_flags,
    complete,
    launch_facts,
    precision_of,
    zero_settings,
)
from loop.distributed.layout import Layout
from loop.distributed.precision import on_gpu, slow_in_bf16
from loop.distributed.rank_zero import quiet_deepspeed

# Timeout of every collective. Ranks wait in collectives while another rank reads data or model.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def init_process_group_once() -> PartialState:
    """Start the process group of all ranks.

    Raises UserError for more ranks than GPUs, with which NCCL cannot start.
    """
    if not on_gpu():
        _prepare_cpu()
        _init_after_restart("gloo")
        # Without `cpu`, accelerate 1.15 assumes one process under a DeepSpeed config (state.py).
        return PartialState(cpu=True, timeout=COLLECTIVE_TIMEOUT)
    check_ranks()
    _init_after_restart("nccl")
    return PartialState(timeout=COLLECTIVE_TIMEOUT)


def check_ranks() -> None:
    """Raise UserError if this machine has GPUs, but fewer GPUs than ranks."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if on_gpu() and ranks > gpus:
        error = UserError(
            f"found {ranks} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}; expected one GPU "
            f"each. Give --num_processes {gpus} (launch.sh: NUM_PROCESSES={gpus})."
        )
        error.known_to_all = os.environ.get("WORLD_SIZE") == str(ranks)  # one machine
        raise error


def _init_after_restart(backend: str) -> None:
    """If torchelastic restarted the ranks, start the process group with a new key prefix.

    The static rendezvous keeps its store and the dead ranks' addresses in it (torch 2.13,
    static_tcp_rendezvous.py). With the same keys, a rank may read an old address before the new
    one is written, and connect to a dead rank (pytorch#135712: the same bug in c10d rendezvous).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return
    found, rank, ranks = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store = PrefixStore(f"attempt {attempt}", found)
    init_process_group(
        backend, store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT
    )


def _prepare_cpu() -> None:
    # If the user does not set OMP_NUM_THREADS, `accelerate launch` exports 1 (accelerate 1.15,
    # commands/launch.py). Then each rank would use one core only.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    # oneDNN caches up to 1,024 compiled matrix products, one per shape. Rows have many lengths,
    # so the cache grows to half a GiB in bf16.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Otherwise DeepSpeed warns of a missing GPU.


def check_launch(config: Config) -> None:
    """Check flags, launch, packages and hardware, before data and model are loaded.

    Raises one UserError that lists every problem with its remedy.
    """
    _, errors = examine_launch(config)
    if errors:
        raise UserError(together(errors))
    if on_gpu():
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    elif slow_in_bf16(config) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {slow_in_bf16(config)}")


def examine_launch(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return DeepSpeed's settings ({} without DeepSpeed), and the errors of flags and launch."""
    errors: list[str] = []
    for name in ("FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            errors.append(
                f"found an accelerate config with {name}; expected DeepSpeed, DDP or one process. "
                "To partition the base model over the ranks: accelerate_configs/zero3.yaml."
            )
    asked, stage = dict[str, Any](), None
    with collect_errors(errors):
        asked = zero_settings(config, errors)
        _adopt_precision(asked, config)
        stage = _stage(asked) if asked else 0
        add_errors(against_flags(asked, config), errors)
    add_errors(problems(config, stage), errors)
    add_errors(_not_on_this_gpu(config) if on_gpu() else _not_on_a_cpu(config), errors)
    return asked, errors


def _adopt_precision(asked: dict[str, Any], config: Config) -> None:
    """Use the DeepSpeed JSON's precision if neither a flag nor the accelerate config sets one."""
    variable = "ACCELERATE_MIXED_PRECISION"
    unset = config.mixed_precision is None and not config.bf16 and not config.fp16
    found = precision_of(asked)
    if found and unset and os.environ.get(variable, "no") == "no":
        os.environ[variable] = found


def _not_on_this_gpu(config: Config) -> Iterator[str]:
    if config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield (
            f"found precision bf16 on {torch.cuda.get_device_name()}, which has no bf16 "
            "instructions. Give --mixed_precision fp16, or no."
        )
    if config.flash_attn and torch.cuda.get_device_capability() < (8, 0):
        yield (
            f"--flash_attn: found {torch.cuda.get_device_name()}; FlashAttention-2 needs an Ampere "
            "GPU or a newer one. Leave the flag out: PyTorch's SDPA is used."
        )


def _not_on_a_cpu(config: Config) -> Iterator[str]:
    if config.precision == "fp16":
        yield (
            "found precision fp16 on a machine without a GPU; expected bf16 or no: fp16 needs loss "
            "scaling, which PyTorch has for GPUs only. Give --mixed_precision bf16."
        )
    if config.flash_attn:
        yield "--flash_attn: found no GPU, which FlashAttention-2 needs. Leave the flag out."


def build_accelerator(config: Config, layout: Layout) -> Accelerator:
    """Return the Accelerator of this launch, with the complete DeepSpeed config.

    Raises UserError for a DeepSpeed JSON that contradicts a flag.
    """
    asked = zero_settings(config)
    plugin = None
    if asked:
        quiet_deepspeed(config.precision == "fp16")
        with raise_on_all_ranks():
            values = complete(asked, config, layout)
        # Otherwise accelerate compares these fields again, and its error is a traceback.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=_stage(values) == 3)
    return Accelerator(
        mixed_precision=config.precision,
        deepspeed_plugin=plugin,
        # By default, the end of a data loader ends an accumulation. Here a window's end does.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=layout.divisor, sync_with_dataloader=False
        ),
    )


def check_agreement(config: Config, facts: dict[str, Any]) -> None:
    """Compare data facts, launch and settings of all ranks; every rank must call this.

    Raises UserError for a difference. Different data or settings would make the gradient wrong.
    Different backends would make ranks wait forever, each in another collective.
    """
    facts = {**facts, **launch_facts(config), **rank_shared_settings(config)}
    everyone = gather_object([facts]) if PartialState().num_processes > 1 else [facts]
    with raise_on_all_ranks():
        for rank, theirs in enumerate(everyone):
            for key in {**everyone[0], **theirs}:
                # A DeepSpeed value may be set on some machines only.
                first, other = everyone[0].get(key, "not set"), theirs.get(key, "not set")
                if first != other:
                    raise UserError(
                        f"{key} is {first} on rank 0 and {other} on rank {rank}; expected the "
                        "same. Give every machine the same files and flags."
                    )


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a UserError of one rank on all ranks, so that no rank waits for a failed one.

    For example, one machine lacks a file. The block must not contain a collective.
    """
    ranks = PartialState()
    reports: list[Any] = [None]
    try:
        yield
    except UserError as error:
        reports = [(ranks.process_index, platform.node(), str(error), type(error))]
    if ranks.num_processes > 1:
        reports = gather_object(reports)
    failures = [report for report in reports if report]
    if failures:
        rank, machine, message, kind = failures[0]
        on_some = len(failures) < len(reports)
        error_of_all = kind(f"on rank {rank}, machine {machine}: {message}" if on_some else message)
        error_of_all.known_to_all = True
        raise error_of_all


def broadcast_flag(answer: bool) -> bool:
    """Return rank 0's answer on every rank."""
    return bool(broadcast_object_list([answer])[0])


def zero_stage(accelerator: Accelerator) -> int:
    """Return the ZeRO stage; 0 without DeepSpeed. Stage 3 partitions the parameters."""
    plugin = accelerator.state.deepspeed_plugin
    return _stage(plugin.deepspeed_config) if plugin else 0


def _stage(values: dict[str, Any]) -> int:
    return int(values["zero_optimization"]["stage"])
