"""Trainable weights gathered from ZeRO on every rank, and the adapter saved by the first."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def file_name(name: str) -> str:
    """Return the name that peft gives a parameter in a file: without that of its adapter."""
    return re.sub(r"\.default(?=\.|$)", "", name)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return what a whole adapter holds, by peft's names, from the model's own parameters."""
    return {
        file_name(name): tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def trained_parameters(model: nn.Module, keep: bool = True) -> Tensors:
    """Return the trainable parameters whole, in fp32, on the CPU; every rank must call this.

    Under DeepSpeed they come from the fp32 master, gathered over the ranks one at a time. A rank
    that does not `keep` them takes part and returns nothing: it needs memory for one of them.
    """
    return gather_trained(model, lambda parameter: parameter, None, keep)


def gather_trained(model: nn.Module, plain: Any, moment: str | None, keep: bool) -> Tensors:
    """Gather each trainable parameter, or one moment of it; every rank must call this.

    plain: the tensor of a parameter that DeepSpeed does not partition.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        value: Tensor | None = None
        if is_partitioned(parameter):
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            value = (
                safe_get_full_optimizer_state(parameter, moment)
                if moment
                else safe_get_full_fp32_param(parameter)
            )
        value = plain(parameter) if value is None else value
        if keep:
            state[name] = value.detach().to("cpu", torch.float32, copy=True)
    return state


def gathered(parameter: nn.Parameter) -> Any:
    """Gather a parameter that ZeRO-3 has shared out; the first rank's changes are kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)


def use_whole(module: nn.Module, parameter: nn.Parameter) -> None:
    """Have ZeRO-3 gather a parameter for a module that uses it while another one holds it."""
    from deepspeed.runtime.zero import register_external_parameter

    register_external_parameter(module, parameter)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed holds the parameter, or its fp32 master, in parts on several ranks."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def save_adapter(
    accelerator: Accelerator,
    model: PeftModel,
    state: Tensors,
    expected: dict[str, tuple[int, ...]],
    folder: Path,
    safetensors: bool = True,
) -> None:
    """Write adapter_config.json and the weights that peft loads, on the first rank.

    state: the gathered parameters, by the model's names; expected: shapes, by names in the file.

    The file is opened again and checked. Raises RuntimeError where it is not what was trained.
    """
    if not accelerator.is_main_process:
        return
    # save_embedding_layers="auto" may ask the hub (peft 0.21, utils/save_and_load.py).
    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    name = "adapter_model.safetensors" if safetensors else "adapter_model.bin"
    partial = folder / f"{name}.partial"
    if safetensors:
        save_file(weights, partial, metadata={"format": "pt"})
    else:
        torch.save(weights, partial)
    saved = load_file(partial) if safetensors else torch.load(partial, weights_only=True)
    try:
        _check_saved(saved, expected, partial)
    except RuntimeError:
        partial.unlink()
        raise
    partial.replace(folder / name)
    adapter_config = model.peft_config["default"]
    adapter_config.inference_mode = True
    adapter_config.save_pretrained(str(folder))
    adapter_config.inference_mode = False


def _check_saved(
    saved: dict[str, Tensor], expected: dict[str, tuple[int, ...]], file: Path
) -> None:
    wrong = sorted({*saved} ^ {*expected})
    wrong += [name for name in saved if tuple(saved[name].shape) != expected.get(name)]
    if wrong:
        raise RuntimeError(f"{file}: missing, unknown or misshapen: {', '.join(wrong[:5])}")
    infinite = [name for name, tensor in saved.items() if not tensor.isfinite().all()]
    if infinite:
        raise RuntimeError(f"{file}: not finite: {', '.join(infinite[:5])}")
    lora_b = [tensor for name, tensor in saved.items() if "lora_B" in name or "embedding_B" in name]
    if not any(tensor.any() for tensor in lora_b):
        raise RuntimeError(f"{file}: every lora_B is zero: the adapter has learnt nothing")


def write_json(file: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)
