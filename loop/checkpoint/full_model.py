"""Saves non-LoRA weights: the other trained parameters, or the complete base model."""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save_file

from data.errors import RunError
from loop.config.flags import Config
from loop.model import new_tokens
from loop.utils import Tensors, file_name, gathered, trained_parameters


def cut_shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Split the tensor names into files, in order; returns one list per file.

    sizes: bytes of each tensor. most: maximum bytes of a file; a larger tensor gets its own file.
    """
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled and filled + size > most:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def shard_name(stem: str, number: int, count: int) -> str:
    """Return the name of file `number` of `count` files, counted from 1."""
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors"


def shard_index(places: Mapping[str, str], size: int) -> str:
    """Return the shard index as JSON: each tensor's file, and the total bytes."""
    return json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1) + "\n"


NAME, INDEX = "non_lora_state", "non_lora_state.safetensors.index.json"
PARTIAL = f".partial-{NAME}"
MAX_SHARD_BYTES = 2 << 30


def save_non_lora(
    accelerator: Accelerator,
    model: PeftModel,
    folder: Path,
    config: Config,
    shard: int = MAX_SHARD_BYTES,
) -> None:
    """Write non_lora_state.safetensors, or its shards and their index; every rank must call this.

    shard: maximum bytes of a file; a larger tensor gets its own file. The index has transformers'
    format. Raises RunError if a file cannot be written; the adapter is already saved then.
    """
    keep = accelerator.is_main_process
    for old in [*folder.glob(f"{NAME}*"), *folder.glob(f"{PARTIAL}*")] if keep else ():
        old.unlink()  # An earlier run may have written other shards.
    if config.save_non_lora_state == "none":
        return
    state = new_tokens.rows(model, trained_parameters(model, keep), keep)
    if config.save_non_lora_state == "trainable":
        named = {file_name(n): t.contiguous() for n, t in state.items() if "lora_" not in n}
        _write(folder / f"{NAME}.safetensors", lambda path: save_file(named, path), keep)
        return
    files = cut_shards(_sizes(model), shard)
    places: dict[str, str] = {}
    size = 0
    for number, names in enumerate(files, 1):
        file = shard_name(NAME, number, len(files))
        tensors: Tensors = {}
        for name in names:
            tensors |= _base_tensors(model, name, state, keep)
        places |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
        _write(folder / file, partial(save_file, tensors, metadata={"format": "pt"}), keep)
    if len(files) > 1:
        text = shard_index(places, size)
        _write(folder / INDEX, lambda path: path.write_text(text, encoding="utf-8"), keep)


def _write(path: Path, write: Callable[[Path], Any], keep: bool) -> None:
    """With `keep`, write a file atomically; raises RunError."""
    unfinished = path.with_name(f"{PARTIAL}-{path.name}")
    try:
        if keep:
            write(unfinished)
            unfinished.replace(path)
    except Exception as error:
        raise RunError(
            f"--save_non_lora_state: {error}. The adapter is saved. Free disk space and run the "
            "command again."
        ) from error


def _sizes(model: PeftModel) -> dict[str, int]:
    """Return the bytes of the base model's parameters and buffers."""
    return {
        name: getattr(tensor, "ds_numel", tensor.numel()) * tensor.element_size()
        for name, tensor in _named(model).items()
    }


def _named(model: PeftModel) -> dict[str, Any]:
    """Return the base model's tensors by their names in this model, each tied tensor once."""
    base = model.get_base_model()
    tensors = dict(base.named_parameters())
    saved = {*base.state_dict(keep_vars=True)}
    tensors |= {name: buffer for name, buffer in base.named_buffers() if name in saved}
    # peft keeps the frozen original of a module that is trained whole.
    added = ("lora_", "trainable_tokens", ".original_module.")
    return {n: t for n, t in tensors.items() if not any(part in n for part in added)}


def _base_tensors(model: PeftModel, name: str, state: Tensors, keep: bool) -> Tensors:
    """Return a gathered tensor by its name in the base model; {} without `keep`.

    A 4-bit tensor comes with its quantisation state, new tokens' rows with their trained values.
    """
    tensor = _named(model)[name]
    with gathered(tensor):
        value = tensor.detach().to("cpu", copy=True).contiguous() if keep else None
    if value is None:
        return {}
    tokens, rows = new_tokens.replaced(model).get(id(tensor), ([], ""))
    if tokens:
        value[tokens] = state[rows].to(value)
    base_name = file_name(name.replace(".base_layer", "").replace(".token_adapter", ""))
    if not hasattr(tensor, "quant_state"):
        return {base_name: value}
    packed = tensor.quant_state.as_dict(packed=True)
    return {base_name: value, **{f"{base_name}.{key}": item.cpu() for key, item in packed.items()}}
