"""Maps a model's parameters to the tensors in its files, which may hold each expert by itself.

transformers 5 fuses experts when it loads a model: the files' `experts.3.gate_proj.weight` and
`experts.3.up_proj.weight` become rows of the parameter `experts.gate_up_proj`.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class AdaptedParameter:
    """A parameter that peft adapts (`target_parameters`).

    scale: of lora_B @ lora_A. experts: 1 for a matrix. out_first: the parameter is
    [experts, out, in], not [experts, in, out].
    """

    name: str
    scale: float
    experts: int
    out_first: bool


def adapted_parameters(folder: Path, model: nn.Module) -> dict[str, AdaptedParameter]:
    """Return the adapted parameters by the module name in the adapter's keys.

    peft nests the wrappers of one module's parameters, so that only peft knows which is which.
    model: the base on the meta device; it stays as it is.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig) or not config.target_parameters:
        return {}
    config.inference_mode = True
    with torch.device("meta"):
        adapted = inject_adapter_in_model(config, copy.deepcopy(model))
    found: dict[str, AdaptedParameter] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, ParamWrapper):
            owner = name.replace(".base_layer", "")
            found[name] = AdaptedParameter(
                f"{owner}.{module.parameter_name}",
                module.scaling["default"],
                module.num_experts,
                module.num_experts == 1 or module._did_swap_in_out_features,
            )
    return found


def stored_factors(
    model: Any, name: str, b: Tensor, a: Tensor, out_first: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return LoRA's two factors of each tensor in the files that holds a part of a parameter.

    b: [experts, out, r], a: [experts, r, in]; or [out, r] and [r, in] for a matrix. The change of a
    stored tensor is the product of its factors, before the scale.
    transformers splits a parameter along experts and outputs. So b is split in its place, with the
    rank for the inputs. A second tensor marks each value's expert and rank.
    """
    rank = b.shape[-1]
    experts = b.shape[0] if b.ndim == 3 else 1
    marks = torch.arange(experts * rank).view(*([experts] * (b.ndim == 3)), 1, rank)
    marks = marks.expand(b.shape)
    if not out_first:
        b, marks = b.transpose(-1, -2), marks.transpose(-1, -2)
    parts = revert_weight_conversion(model, {name: b.contiguous()})
    marked = revert_weight_conversion(model, {name: marks.contiguous()})
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for key, part in parts.items():
        if part.ndim == 3:  # not split by expert
            first = _rank_is_last(marked[key][0], rank)
            factors[key] = (part, a) if first else (a.transpose(1, 2), part)
            continue
        mark = marked[key]
        own = a[int(mark.flatten()[0]) // rank] if a.ndim == 3 else a
        factors[key] = (part, own) if _rank_is_last(mark, rank) else (own.T, part)
    return factors


def _rank_is_last(mark: Tensor, rank: int) -> bool:
    if rank == 1:
        return mark.shape[-1] == 1
    return mark.shape[-1] == rank and int(mark[0, 1]) != int(mark[0, 0])


def stored_name(model: Any, name: str, tensor: Tensor) -> str:
    """Return the name in the files of a parameter that is stored as one tensor, or its own name."""
    [(key, stored), *others] = revert_weight_conversion(model, {name: tensor}).items()
    return name if others or stored.shape != tensor.shape else key
