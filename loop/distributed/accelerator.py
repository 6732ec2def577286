"""Builds the Accelerator: device, precision, accumulation, DeepSpeed; meets the other ranks."""

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

# Of any collective: longer than a rank may be behind while each reads data and model for itself.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def init_process_group_once() -> PartialState:
    """Meet the other ranks in a process group.

    Raises UserError for more ranks than GPUs, which could not even meet.
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
    """Raise UserError for more ranks than this machine has GPUs, where it has any."""
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if on_gpu() and ranks > gpus:
        error = UserError(
            f"found {ranks} ranks on a machine with {gpus} GPU{'s' * (gpus > 1)}; expected one GPU "
            f"each. Give --num_processes {gpus} (launch.sh: NUM_PROCESSES={gpus})."
        )
        error.known_to_all = os.environ.get("WORLD_SIZE") == str(ranks)  # one machine
        raise error


def _init_after_restart(backend: str) -> None:
    """Where torchelastic has started the ranks again, let them meet under keys of their own.

    The static rendezvous keeps its store (torch 2.13, static_tcp_rendezvous.py), and in it the
    addresses of the ranks that are gone: whoever read before all had written called those in vain
    (pytorch#135712 is the same of the c10d rendezvous).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return
    found, rank, ranks = next(rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    store = PrefixStore(f"attempt {attempt}", found)
    init_process_group(
        backend, store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT
    )


def check_launch(config: Config) -> None:
    """Check flags, launch, packages and hardware, before anything is loaded.

    Raises UserError with all that cannot work, naming what does.
    """
    _, errors = examine_launch(config)
    if errors:
        raise UserError(together(errors))
    if on_gpu():
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
    elif slow_in_bf16(config) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {slow_in_bf16(config)}")


def examine_launch(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Return what is asked of DeepSpeed, empty without it, and all that cannot work."""
    errors: list[str] = []
    for name in ("FSDP", "MEGATRON_LM"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            errors.append(
                f"found an accelerate config with {name}; expected DeepSpeed, DDP or one process. "
                "To share the base model out over the ranks: accelerate_configs/zero3.yaml."
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
        # It would look for contradictions of its own, and tell them with a trace.
        os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
        plugin = DeepSpeedPlugin(hf_ds_config=values, zero3_init_flag=_stage(values) == 3)
    return Accelerator(
        mixed_precision=config.precision,
        deepspeed_plugin=plugin,
        # The default, True, ends an accumulation with the data loader; windows end it here.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=layout.divisor, sync_with_dataloader=False
        ),
    )


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Turn a mistake that any rank meets into one that all ranks raise, so that none waits.

    A machine may lack a file that the others have. Nothing in the block may be a collective.
    """
    ranks = PartialState()
    told: list[Any] = [None]
    try:
        yield
    except UserError as error:
        told = [(ranks.process_index, platform.node(), str(error), type(error))]
    if ranks.num_processes > 1:
        told = gather_object(told)
    found = [report for report in told if report]
    if found:
        rank, machine, mistake, kind = found[0]
        alone = len(found) < len(told)
        told_error = kind(f"on rank {rank}, machine {machine}: {mistake}" if alone else mistake)
        told_error.known_to_all = True
        raise told_error


def check_agreement(config: Config, facts: dict[str, Any]) -> None:
    """Make sure that all ranks hold the same facts, launch and settings; every rank must call this.

    Raises UserError: with other data or settings on one machine the gradient would be wrong, and
    with another backend the ranks would wait for each other in different collectives.
    """
    facts = {**facts, **launch_facts(config), **rank_shared_settings(config)}
    everyone = gather_object([facts]) if PartialState().num_processes > 1 else [facts]
    with raise_on_all_ranks():
        for rank, theirs in enumerate(everyone):
            for key in {**everyone[0], **theirs}:
                # Of DeepSpeed's values one machine may have what the other leaves open.
                first, other = everyone[0].get(key, "not set"), theirs.get(key, "not set")
                if first != other:
                    raise UserError(
                        f"{key} is {first} on rank 0 and {other} on rank {rank}; expected the "
                        "same. Give every machine the same files and flags."
                    )


def broadcast_flag(answer: bool) -> bool:
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


def _prepare_cpu() -> None:
    # `accelerate launch` exports OMP_NUM_THREADS=1 when the user set nothing (accelerate 1.15,
    # commands/launch.py): that would leave all cores but one idle.
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    # oneDNN caches 1,024 compiled products, one a shape, and every row has its own length: in bf16
    # half a GiB.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
