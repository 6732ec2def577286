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

# For every collective: longer than any rank needs to read data and model before it joins.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def init_process_group_once() -> PartialState:
    """Start the process group of all ranks.

    Raises UserError for more ranks than GPUs: NCCL could not start.
    """
    if not on_gpu():
        _prepare_cpu()
        _init_after_restart("gloo")
        # Without `cpu`, accelerate 1.15 sees one process under a DeepSpeed config (state.py).
        return PartialState(cpu=True, timeout=COLLECTIVE_TIMEOUT)
    check_ranks()
    _init_after_restart("nccl")
    return PartialState(timeout=COLLECTIVE_TIMEOUT)


def check_ranks() -> None:
    """Raise UserError if this machine has GPUs, but fewer than ranks."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if on_gpu() and ranks > gpus:
        error = UserError(
            f"found {ranks} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}; expected one GPU "
            f"each. Give --num_processes {gpus} (launch.sh: NUM_PROCESSES={gpus})."
        )
        error.known_to_all = os.environ.get("WORLD_SIZE") == str(ranks)  # one machine
        raise error


def _init_after_restart(backend: str) -> None:
    """Start the process group under a key prefix of its own if torchelastic restarted the ranks.

    The static rendezvous keeps its store (torch 2.13, static_tcp_rendezvous.py), and with it the
    addresses of the dead ranks. A rank that reads them before the new ranks have written theirs
    connects to dead ranks (pytorch#135712 is the same bug in the c10d rendezvous).
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
    # `accelerate launch` exports OMP_NUM_THREADS=1 if the user does not set it (accelerate 1.15,
    # commands/launch.py). All cores but one would be idle.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    # oneDNN caches 1,024 compiled products, one per shape, and every row has its own length: half
    # a GiB in bf16.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # Else DeepSpeed warns that it found no GPU.


def check_launch(config: Config) -> None:
    """Check flags, launch, packages and hardware, before anything is loaded.

    Raises UserError that lists every problem with its remedy.
    """
    _, errors = examine_launch(config)
    if errors:
        raise UserError(together(errors))
    if on_gpu():
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    elif slow_in_bf16(config) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {slow_in_bf16(config)}")


def examine_launch(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return the DeepSpeed settings, empty without DeepSpeed, and every problem of the launch."""
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
    """Use the DeepSpeed file's precision if neither a flag nor the accelerate config sets one."""
    variable = "ACCELERATE_MIXED_PRECISION"
    unset = config.mixed_precision is None and not config.bf16 and not config.fp16
    found = precision_of(asked)
    if found and unset and os.environ.get(variable, "no") == "no":
        os.environ[variable] = found


def _not_on_this_gpu(config: Config) -> Iterator[str]:
    if config.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield (
            f"found precision bf16 on {torch.cuda.get_device_name()}, which lacks it. "
            "Give --mixed_precision fp16, or no."
        )
    if config.flash_attn and torch.cuda.get_device_capability() < (8, 0):
        yield (
            f"--flash_attn: found {torch.cuda.get_device_name()}; FlashAttention-2 needs an Ampere "
            "GPU or a newer one. Leave it out: PyTorch's SDPA is used."
        )


def _not_on_a_cpu(config: Config) -> Iterator[str]:
    if config.precision == "fp16":
        yield (
            "found precision fp16 on a machine without a GPU; expected bf16 or no: fp16 needs loss "
            "scaling, which PyTorch has for GPUs only. Give --mixed_precision bf16."
        )
    if config.flash_attn:
        yield "--flash_attn: found no GPU, which FlashAttention-2 needs. Leave it out."


def build_accelerator(config: Config, layout: Layout) -> Accelerator:
    """Return the Accelerator for this launch; DeepSpeed gets the loop's own values.

    Raises UserError for a DeepSpeed file that contradicts a flag.
    """
    asked = zero_settings(config)
    plugin = None
    if asked:
        quiet_deepspeed(config.precision == "fp16")
        with raise_on_all_ranks():
            values = complete(asked, config, layout)
        # accelerate would compare these fields itself, and raise a traceback.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=_stage(values) == 3)
    return Accelerator(
        mixed_precision=config.precision,
        deepspeed_plugin=plugin,
        # The default, True, ends an accumulation with the data loader. Here a window ends it.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=layout.divisor, sync_with_dataloader=False
        ),
    )


def check_agreement(config: Config, facts: dict[str, Any]) -> None:
    """Compare data facts, launch and settings of all ranks; every rank must call this.

    Raises UserError for a difference. With different data or settings the gradient is wrong. With
    different backends the ranks wait for each other in different collectives.
    """
    facts = {**facts, **launch_facts(config), **rank_shared_settings(config)}
    everyone = gather_object([facts]) if PartialState().num_processes > 1 else [facts]
    with raise_on_all_ranks():
        for rank, theirs in enumerate(everyone):
            for key in {**everyone[0], **theirs}:
                # A machine may lack a DeepSpeed value that another one has.
                first, other = everyone[0].get(key, "not set"), theirs.get(key, "not set")
                if first != other:
                    raise UserError(
                        f"{key} is {first} on rank 0 and {other} on rank {rank}; expected the "
                        "same. Give every machine the same files and flags."
                    )


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise the UserError of any rank on all ranks, so that no rank waits for one that failed.

    A machine may lack a file that the others have. The block must not contain a collective.
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
