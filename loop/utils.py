"""The adapter as peft loads it: gathered from all ranks, saved and checked by the first."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from loop.distributed.optimizer_state import shapes, trained_parameters
from loop.model import new_tokens


def save_adapter(
    accelerator: Accelerator, model: PeftModel, folder: Path, safetensors: bool = True
) -> None:
    """Write adapter_config.json and the weights that peft loads; every rank must call this.

    The file is opened again and checked. Raises RuntimeError where it is not what was trained.
    """
    main = accelerator.is_main_process
    state = new_tokens.rows(model, trained_parameters(model, keep=main), keep=main)
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
        _check_saved(saved, {**shapes(model), **new_tokens.row_shapes(model)}, partial)
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
