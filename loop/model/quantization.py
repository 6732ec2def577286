"""QLoRA's base weights: NF4 in bitsandbytes' format, where it works, and what parameters weigh."""

import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.errors import UserError
from loop.config.flags import Config


@contextmanager
def kept_in_fp32() -> Iterator[None]:
    """Have transformers load those modules in fp32 in bf16 too.

    Left to itself it does so in fp16 only (5.23, modeling_utils.py, `_get_dtype_plan`).
    """
    plan = PreTrainedModel._get_dtype_plan

    def plan_of_fp16(self: Any, _: torch.dtype) -> Any:
        return plan(self, torch.float16)

    PreTrainedModel._get_dtype_plan = plan_of_fp16
    try:
        yield
    finally:
        PreTrainedModel._get_dtype_plan = plan


def compute_in_fp32(model: nn.Module, deepspeed: bool) -> None:
    """Have those modules compute in fp32 under autocast too, and DeepSpeed leave them as they are.

    Call it before LoRA is injected: what is in fp32 then was loaded so.
    """
    linear: list[Any] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    held = [module for module in linear if module.weight.dtype == torch.float32]
    for module in held:
        module.forward = partial(_without_autocast, module.forward)
        module.weight.held_in_fp32 = True
    if held and deepspeed:
        _spare_from_the_cast()


def _without_autocast(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        return forward(inputs.float())


def _spare_from_the_cast() -> None:
    """Put back what DeepSpeed has cast, before it shares it out.

    It casts every parameter to one dtype (0.19.8, runtime/engine.py), and keeps buffers only.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    cast = DeepSpeedEngine._cast_module_mixed_precision

    def cast_the_others(engine: Any, *arguments: Any) -> None:
        held = {p: p.data for p in engine.module.parameters() if hasattr(p, "held_in_fp32")}
        cast(engine, *arguments)
        for parameter, data in held.items():
            parameter.data = data

    DeepSpeedEngine._cast_module_mixed_precision = cast_the_others


DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def four_bit(compute_dtype: torch.dtype) -> Any:
    """Return transformers' settings for NF4 with double quantisation.

    The codes are stored in tensors of the compute dtype: ZeRO-3 shares out floating-point
    parameters only, and DeepSpeed casts a model to one dtype. No other parameter is upcast, unlike
    peft's `prepare_model_for_kbit_training` (0.21, utils/other.py), which holds embeddings, norms
    and LM head in fp32: LLaMA's norms compute in fp32 by themselves, and the loss casts its logits.
    T5's `wo` is left out of the 4-bit layers by transformers, and held in fp32 by fp32.py.
    """
    _unblock_bitsandbytes()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=compute_dtype,
    )


@contextmanager
def returned_memory() -> Iterator[None]:
    """Have freed blocks of a MiB or more go back to the system, while weights are changed.

    glibc raises that limit to 32 MiB by itself (mallopt(3)). Then the blocks that hold a layer's
    weights on their way fill the heap with holes: 314 MB in place of 75 when 135 million weights
    are quantised, and now and then 75 MB more when they are merged.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        yield
        return
    mmap_threshold, trim_threshold = -3, -1
    try:
        libc.mallopt(mmap_threshold, 1 << 20)
        libc.mallopt(trim_threshold, 1 << 20)
        yield
    finally:
        # What they grow to by themselves; tensors of training steps are not mapped anew each time.
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)


def _unblock_bitsandbytes() -> None:
    """Undo the block of the entry files, and let peft and transformers look again."""
    if sys.modules.get("bitsandbytes", True) is None:
        del sys.modules["bitsandbytes"]
    # On a CPU it misses a faster kernel each time it is imported (0.50, backends/cpu/ops.py).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import import_utils
    from transformers.utils import import_utils as transformers_import_utils

    for module in (import_utils, transformers_import_utils):
        for name, value in vars(module).items():
            if ("bnb" in name or "bitsandbytes" in name) and hasattr(value, "cache_clear"):
                value.cache_clear()


def check_quantization(base: str, base_config: Any, config: Config, zero: dict[str, Any]) -> None:
    """Refuse, before weights are read, a combination that cannot work.

    zero: DeepSpeed's `zero_optimization`, empty without it. Raises UserError.
    """
    stored = getattr(base_config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    four = method == "bitsandbytes" and stored.get("load_in_4bit", False)
    if method and not four:
        raise UserError(
            f"{base}: its weights are quantised already ({method}); expected plain weights, which "
            "--q_lora True quantises, or a 4-bit bitsandbytes model."
        )
    if four and not config.q_lora:
        raise UserError(f"{base}: its weights are 4-bit; expected plain ones. Give --q_lora True.")
    stage = zero.get("stage", 0)
    if four:
        _check_own(base, stored, config, stage)
    if not config.q_lora or stage != 3:
        return
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            raise UserError(
                f"--q_lora True: found {key} in the DeepSpeed config, which would quantise the "
                "4-bit codes once more. Remove it, or use accelerate_configs/zero3.yaml."
            )


def about_zero3(config: Config) -> str:
    """Say what is known of QLoRA under ZeRO-3."""
    return (
        "QLoRA under ZeRO-3 was measured on two CPU ranks (one process' losses, half of the "
        "4-bit weights each) and on one H100 (the plain backend's losses); several GPUs were not."
        + " Without --gradient_checkpointing True, the backward pass holds all 4-bit weights whole."
        * (not config.gradient_checkpointing)
    )


def _check_own(base: str, stored: dict[str, Any], config: Config, stage: int) -> None:
    """Compare the settings that a 4-bit model brings, which beat the run's, with the run's."""
    # What is not there is as bitsandbytes' own defaults say (transformers, BitsAndBytesConfig).
    kind = stored.get("bnb_4bit_quant_type") or "fp4"
    if kind != "nf4":
        raise UserError(
            f"{base}: its 4-bit weights are of the type {kind}; expected nf4. Give the plain "
            "model, which --q_lora True quantises."
        )
    dtype = DTYPES[config.precision]
    computed = str(stored.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    if computed != dtype:
        fitting = [precision for precision, name in DTYPES.items() if name == computed]
        remedy = f"--mixed_precision {fitting[0]}, or " if fitting else ""
        raise UserError(
            f"{base}: its 4-bit weights compute in {computed}, and the run in {dtype}; expected "
            f"the same. Give {remedy}the plain model."
        )
    storage = str(stored.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    if stage == 3 and storage != dtype:
        raise UserError(
            f"{base}: its 4-bit weights are stored as {storage}, which ZeRO-3 cannot share out; "
            f"expected {dtype}. Give the plain model, or use accelerate_configs/"
            f"{'ddp' if 'float' in storage else 'zero2'}.yaml."
        )
    # DeepSpeed 0.19 casts what is floating-point by value, and these are codes (runtime/engine.py).
    if stage and "float" in storage and storage != dtype:
        raise UserError(
            f"{base}: its 4-bit weights are stored as {storage}, which DeepSpeed would cast to "
            f"{dtype}; expected that, or uint8. Give the plain model, or use "
            "accelerate_configs/ddp.yaml."
        )


def describe_parameters(model: nn.Module) -> str:
    """Say how many parameters there are and are trained, and their bytes by dtype, unsharded."""
    total = trainable = 0
    size: Counter[str] = Counter()
    for parameter in model.parameters():
        stored = getattr(parameter, "ds_numel", parameter.numel())  # whole, also under ZeRO-3
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else stored
        total += count
        trainable += count if parameter.requires_grad else 0
        kind = "4-bit" if state is not None else str(parameter.dtype).removeprefix("torch.")
        size[kind] += stored * parameter.element_size()
        if state is not None:
            size["4-bit scales"] += scale_bytes(state)
    by_dtype = ", ".join(f"{kind} {n / 2**20:,.1f} MiB" for kind, n in size.most_common())
    return (
        f"base {total - trainable:,} parameters, trainable {trainable:,} "
        f"({100 * trainable / total:.3f} %); {by_dtype}"
    )


def scale_bytes(state: Any) -> int:
    """Return the bytes of one weight's scales; every rank holds them all, under ZeRO-3 too."""
    tensors = [state.absmax, state.code, state.offset]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
