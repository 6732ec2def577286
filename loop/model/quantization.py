"""QLoRA: NF4 settings, layers kept in fp32, checks of stored weights, and parameter sizes."""

import ctypes
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.errors import UserError
from loop.config.flags import Config
from loop.model.dtypes import DTYPE_NAMES
from loop.model.lora_targets import kind_of


@contextmanager
def kept_in_fp32() -> Iterator[None]:
    """Make transformers load a model's `_keep_in_fp32_modules` in fp32, also in a bf16 model.

    By default, it does so in an fp16 model only (5.23, modeling_utils.py, `_get_dtype_plan`).
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
    """Make linear layers that are stored in fp32 compute in fp32, also under autocast.

    deepspeed: also exempt them from DeepSpeed's cast. Call this before LoRA is injected: until
    then, only the layers of `kept_in_fp32` are fp32.
    """
    linear: list[Any] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    in_fp32 = [module for module in linear if module.weight.dtype == torch.float32]
    for module in in_fp32:
        module.forward = partial(_without_autocast, module.forward)
        module.weight.held_in_fp32 = True
    if in_fp32 and deepspeed:
        _exempt_from_deepspeed_cast()


def _without_autocast(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        return forward(inputs.float())


def _exempt_from_deepspeed_cast() -> None:
    """Undo DeepSpeed's cast of `held_in_fp32` parameters, before it partitions them.

    DeepSpeed casts every parameter to one dtype; only buffers can be exempt (0.19.8,
    runtime/engine.py).
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    cast = DeepSpeedEngine._cast_module_mixed_precision

    def cast_others(engine: Any, *arguments: Any) -> None:
        held = {p: p.data for p in engine.module.parameters() if hasattr(p, "held_in_fp32")}
        cast(engine, *arguments)
        for parameter, data in held.items():
            parameter.data = data

    DeepSpeedEngine._cast_module_mixed_precision = cast_others


def four_bit(compute_dtype: torch.dtype) -> Any:
    """Return transformers' settings for NF4 with double quantisation.

    The codes are stored in tensors of the compute dtype, because ZeRO-3 partitions floating-point
    parameters only and DeepSpeed casts a model to one dtype.

    Embeddings, norms and LM head stay in the compute dtype. peft's
    `prepare_model_for_kbit_training` (0.21, utils/other.py) would upcast them to fp32. This is not
    needed: LLaMA's norms compute in fp32, and the loss casts its logits. transformers does not
    quantise T5's `wo`; `kept_in_fp32` loads it in fp32.
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
    """While weights are converted, return freed blocks of 1 MiB or more to the system.

    By default, glibc raises this limit up to 32 MiB (mallopt(3)). Then each layer's temporary
    blocks fragment the heap: quantising 135 million weights takes 314 MB instead of 75 MB, and
    merging them sometimes takes 75 MB more.
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
        # glibc's own maximum: blocks of a training step are reused instead of mapped again.
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 64 << 20)


def _unblock_bitsandbytes() -> None:
    """Allow the import of bitsandbytes, which train.py and __main__.py block.

    peft and transformers cache whether it can be imported, so these caches are cleared.
    """
    if sys.modules.get("bitsandbytes", True) is None:
        del sys.modules["bitsandbytes"]
    # On a CPU, each import warns about a missing faster kernel (0.50, backends/cpu/ops.py).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import import_utils
    from transformers.utils import import_utils as transformers_import_utils

    for module in (import_utils, transformers_import_utils):
        for name, value in vars(module).items():
            if ("bnb" in name or "bitsandbytes" in name) and hasattr(value, "cache_clear"):
                value.cache_clear()


def check_quantization(base: str, base_config: Any, config: Config, zero: dict[str, Any]) -> None:
    """Raise UserError if the stored weights do not fit the flags; the weights are not read.

    zero: DeepSpeed's `zero_optimization`; empty without DeepSpeed.
    """
    stored = getattr(base_config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = stored.get("quant_method")
    four = method == "bitsandbytes" and stored.get("load_in_4bit", False)
    if method and not four:
        raise UserError(
            f"{base}: its weights are quantised already ({method}); expected plain weights or a "
            "4-bit bitsandbytes model. Give the plain model; --q_lora True quantises it."
        )
    if four and not config.q_lora:
        raise UserError(f"{base}: its weights are 4-bit; expected plain ones. Give --q_lora True.")
    stage = zero.get("stage", 0)
    if four:
        _check_stored_settings(base, stored, config, stage)
    if not config.q_lora or stage != 3:
        return
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(key):
            raise UserError(
                f"--q_lora True: found {key} in the DeepSpeed config, which would quantise the "
                "4-bit codes again; expected none. Remove it, or use "
                "accelerate_configs/zero3.yaml."
            )


def about_zero3(config: Config) -> str:
    """Return a note on where QLoRA under ZeRO-3 was tested."""
    return (
        "QLoRA under ZeRO-3 was tested on two CPU ranks and on one H100, with the same losses as "
        "without DeepSpeed. It was not tested on several GPUs."
        + " Without --gradient_checkpointing True, the backward pass gathers all 4-bit weights."
        * (not config.gradient_checkpointing)
    )


def _check_stored_settings(base: str, stored: dict[str, Any], config: Config, stage: int) -> None:
    """Raise UserError if a stored 4-bit model's settings do not fit; they override the loop's."""
    # Defaults of transformers' BitsAndBytesConfig.
    kind = stored.get("bnb_4bit_quant_type") or "fp4"
    if kind != "nf4":
        raise UserError(
            f"{base}: its 4-bit weights are of the type {kind}; expected nf4. Give the plain "
            "model; --q_lora True quantises it."
        )
    dtype = DTYPE_NAMES[config.precision]
    computed = str(stored.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    if computed != dtype:
        fitting = [precision for precision, name in DTYPE_NAMES.items() if name == computed]
        remedy = f"--mixed_precision {fitting[0]}, or " if fitting else ""
        raise UserError(
            f"{base}: its 4-bit weights compute in {computed}, and the run in {dtype}; expected "
            f"the same. Give {remedy}the plain model."
        )
    storage = str(stored.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    if stage == 3 and storage != dtype:
        raise UserError(
            f"{base}: its 4-bit weights are stored as {storage}, which ZeRO-3 cannot partition; "
            f"expected {dtype}. Give the plain model, or use accelerate_configs/"
            f"{'ddp' if 'float' in storage else 'zero2'}.yaml."
        )
    # DeepSpeed 0.19 casts floating-point tensors by value (runtime/engine.py), which would change
    # the 4-bit codes in them.
    if stage and "float" in storage and storage != dtype:
        raise UserError(
            f"{base}: its 4-bit weights are stored as {storage}, which DeepSpeed would cast to "
            f"{dtype}; expected {dtype} or uint8. Give the plain model, or use "
            "accelerate_configs/ddp.yaml."
        )


def describe_parameters(model: nn.Module) -> str:
    """Return parameter counts, frozen and trainable, and the unpartitioned bytes by dtype."""
    total = trainable = 0
    size: Counter[str] = Counter()
    for parameter in model.parameters():
        stored = getattr(parameter, "ds_numel", parameter.numel())  # unpartitioned under ZeRO-3
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
        f"({100 * trainable / total:.3f} %); adapted: {_adapted(model)}; {by_dtype}"
    )


def _adapted(model: nn.Module) -> str:
    """Return the number of adapted matrices by kind; each expert of a parameter counts."""
    kinds: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            owner = name.replace(".base_layer", "")
            kinds[kind_of(f"{owner}.{module.parameter_name}")] += module.num_experts
        elif isinstance(module, LoraLayer):
            kinds[kind_of(name)] += 1
    names = {"expert": "experts"}
    return ", ".join(f"{n:,} {names.get(kind, kind)}" for kind, n in kinds.items()) or "nothing"


def scale_bytes(state: Any) -> int:
    """Return the bytes of one weight's scales, which ZeRO-3 does not partition."""
    tensors = [state.absmax, state.code, state.offset]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
