"""Holds in fp32, beside 4-bit weights, the modules for which a model asks for it: T5's `wo`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def loaded() -> Iterator[None]:
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


def computed(model: nn.Module, deepspeed: bool) -> None:
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
