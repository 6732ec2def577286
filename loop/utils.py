"""Gathers trainable weights from ZeRO on every rank; rank 0 saves and checks the adapter."""

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

from data.errors import RunError

Tensors = dict[str, Tensor]
# The keys of adapter_config.json that other programs read; they are written at their defaults, too.
COMMON_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "bias", "target_modules"),
}


def trained_parameters(model: nn.Module, keep: bool = True) -> Tensors:
    """Return the gathered trainable parameters, in fp32, on the CPU; every rank must call this.

    Under DeepSpeed, the values are the fp32 master weights, gathered one parameter at a time. A
    rank without `keep` returns nothing, so it needs memory for one parameter only.
    """
    return gather_trained(model, lambda parameter: parameter, None, keep)


def gather_trained(model: nn.Module, plain: Any, moment: str | None, keep: bool) -> Tensors:
    """Gather each trainable parameter, or one of its moments; every rank must call this.

    plain: returns the tensor of a parameter that DeepSpeed does not partition. moment: its name;
    None for the parameter itself.
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


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether DeepSpeed partitions the parameter, or its fp32 master, over the ranks."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def gathered(parameter: nn.Parameter) -> Any:
    """Gather a parameter that ZeRO-3 partitions, for a `with` block; rank 0's changes are kept."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=0)


def use_whole(module: nn.Module, parameter: nn.Parameter) -> None:
    """Make ZeRO-3 gather a parameter for a module that uses it but does not own it."""
    from deepspeed.runtime.zero import register_external_parameter

    register_external_parameter(module, parameter)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the unpartitioned shapes of the trainable parameters, by peft's names for files."""
    return {
        file_name(name): tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def file_name(name: str) -> str:
    """Return a parameter's name in peft's files; a name in a file stays the same.

    The files omit the adapter's name. A module that is trained whole has the base's name, and
    DoRA's magnitude no `.weight` (peft 0.21).

    >>> file_name("lm_head.modules_to_save.default.weight")
    'lm_head.weight'
    """
    name = re.sub(r"\.default(?=\.|$)|\.modules_to_save(?=\.)", "", name)
    return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name)


def adapter_weights(model: PeftModel, state: Tensors) -> Tensors:
    """Return the adapter's tensors by peft's names for files. state: by the model's names."""
    # save_embedding_layers="auto" may contact the hub (peft 0.21, utils/save_and_load.py).
    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return {name: tensor.contiguous() for name, tensor in weights.items()}


def save_adapter(
    accelerator: Accelerator,
    model: PeftModel,
    state: Tensors,
    expected: dict[str, tuple[int, ...]],
    folder: Path,
    safetensors: bool = True,
) -> None:
    """On rank 0, write adapter_config.json and the adapter's weights in peft's format.

    state: the gathered parameters, by the model's names. expected: shapes, by names in the file.
    The weights are read back. Raises RunError for wrong names or shapes, for a value that is not
    finite, and for an untrained adapter. The file is then kept as `rejected-<name>`.
    """
    if not accelerator.is_main_process:
        return
    weights = adapter_weights(model, state)
    name = "adapter_model.safetensors" if safetensors else "adapter_model.bin"
    partial = folder / f"{name}.partial"
    if safetensors:
        save_file(weights, partial, metadata={"format": "pt"})
    else:
        torch.save(weights, partial)
    saved = load_file(partial) if safetensors else torch.load(partial, weights_only=True)
    try:
        _check_saved(saved, expected, folder / name)
    except RunError as error:
        rejected = folder / f"rejected-{name}"
        partial.replace(rejected)  # It may be the only copy of the weights.
        raise RunError(f"{error} The weights are kept in {rejected.name}.") from None
    partial.replace(folder / name)
    write_json(folder / "adapter_config.json", adapter_settings(model))


def adapter_settings(model: PeftModel) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    It has the common keys, and others that are not at their defaults: peft 0.11, which FastChat
    uses, refuses keys that it does not know.
    """
    config = model.peft_config["default"]
    default = type(config)().to_dict()
    found = {
        name: value
        for name, value in config.to_dict().items()
        if name in COMMON_KEYS or value != default.get(name)
    }
    settings: dict[str, Any] = json.loads(json.dumps(found, default=sorted))
    return {**settings, "inference_mode": True}


def _check_saved(
    saved: dict[str, Tensor], expected: dict[str, tuple[int, ...]], file: Path
) -> None:
    wrong = sorted({*saved} ^ {*expected})
    wrong += [name for name in saved if tuple(saved[name].shape) != expected.get(name)]
    if wrong:
        names = ", ".join(wrong[:5])
        raise RunError(f"{file}: missing, unexpected or of the wrong shape: {names}.")
    infinite = [name for name, tensor in saved.items() if not tensor.isfinite().all()]
    if infinite:
        raise RunError(f"{file}: not finite: {', '.join(infinite[:5])}.")
    lora_b = {n: tensor for n, tensor in saved.items() if "lora_B" in n or "embedding_B" in n}
    zero = [name for name, tensor in lora_b.items() if not tensor.any()]
    if len(zero) == len(lora_b):
        raise RunError(f"{file}: every lora_B is zero: the adapter is not trained.")
    if zero:
        names = ", ".join(name.partition(".lora_")[0] for name in zero[:5])
        print(
            f"note: {len(zero)} of {len(lora_b)} adapted modules got no gradient, so they are as "
            f"in the base model: {names}{', ...' if len(zero) > 5 else ''}"
        )


def write_json(file: Path, value: Any) -> None:
    """Write JSON atomically."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)
