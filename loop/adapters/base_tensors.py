"""Reads a base model's tensors one at a time, from its files or from loaded 4-bit weights."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft.utils.integrations import dequantize_bnb_weight
from safetensors import safe_open
from torch import Tensor, nn

from data.errors import UserError
from loop.adapters.adapter import Adapter
from loop.adapters.stored_names import stored_name
from loop.model.base import as_user_error, meta_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Source:
    """A model's tensors by name; `read` loads one of them.

    dtype: the dtype of most elements.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], Tensor]


def skeleton_of(adapter: Adapter) -> nn.Module:
    """Return the base model without weights, on the meta device; raises UserError."""
    code = adapter.hub["trust_remote_code"]
    model: nn.Module = meta_model(adapter.base, adapter.base_config, code)
    return model


def folder_of(adapter: Adapter) -> Path:
    """Return the folder of the base's files, downloaded if necessary; raises UserError."""
    folder = Path(adapter.base)
    if not folder.is_dir():
        with as_user_error(adapter.base):
            patterns = ["*.safetensors", "*.json", "*.py"]
            cache = adapter.hub["cache_dir"]
            folder = Path(snapshot_download(adapter.base, allow_patterns=patterns, cache_dir=cache))
    return folder


def tensors_in(folder: Path) -> Source:
    """Return the tensors of the folder's safetensors files; raises UserError if there are none.

    Each read maps the file again, so no tensor stays in memory.
    """
    index = folder / INDEX
    if index.is_file():
        file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, "pt") as file:
            file_of = dict.fromkeys(file.keys(), WEIGHTS)
    else:
        raise UserError(
            f"{folder}: holds no {WEIGHTS}; expected safetensors. Load the model with transformers "
            "and save it again, with save_pretrained."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    elements: dict[torch.dtype, int] = defaultdict(int)
    for name in sorted({*file_of.values()}):
        with as_user_error(str(folder / name)), safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                header = file.get_slice(key)
                shapes[key] = tuple(header.get_shape())
                if stored := SAFETENSORS_DTYPES.get(header.get_dtype()):
                    elements[stored] += torch.Size(shapes[key]).numel()

    def read(key: str) -> Tensor:
        with safe_open(folder / file_of[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    return Source(shapes, max(elements, key=elements.__getitem__), read)


def tensors_of(model: Any) -> Source:
    """Return a loaded model's tensors; 4-bit weights are dequantised to their compute dtype."""
    saved = {*model.state_dict()}
    tensors: dict[str, Any] = dict(model.named_parameters())
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in saved}

    def shape(tensor: Any) -> tuple[int, ...]:
        return tuple((getattr(tensor, "quant_state", None) or tensor).shape)

    def read(key: str) -> Tensor:
        tensor = tensors[key]
        plain = getattr(tensor, "quant_state", None) is None
        read: Tensor = tensor.detach() if plain else dequantize_bnb_weight(tensor)
        return read

    return Source({key: shape(tensor) for key, tensor in tensors.items()}, model.dtype, read)


def owners(skeleton: nn.Module, source: Source) -> dict[str, str]:
    """Map the name of each tensor of the model to its name in the source.

    Several modules may share a matrix. It is stored once, or several times with equal values.
    Flan-T5's LM head has its own values, although its configuration declares it as tied.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    parameters = skeleton.state_dict(keep_vars=True)
    for name, tensor in parameters.items():
        groups[id(tensor)].append(name)
    head_names = vocabulary_names(skeleton)[1:]
    owner: dict[str, str] = {}
    for names in groups.values():
        stored = [name for name in names if name in source.shapes]
        if not stored:  # renamed when transformers loads the files
            renamed = {name: stored_name(skeleton, name, parameters[name].data) for name in names}
            owner |= {name: key for name, key in renamed.items() if key in source.shapes}
            continue
        stored.sort(key=lambda name: name in head_names)  # the embedding first
        distinct = stored[:1]
        for name in stored[1:]:
            values = source.read(name)
            equal = [known for known in distinct if torch.equal(source.read(known), values)]
            distinct += [] if equal else [name]
            owner[name] = equal[0] if equal else name
        for name in names:
            if distinct:
                owner.setdefault(name, distinct[0])
    return owner


def vocabulary_names(model: Any) -> list[str]:
    """Return the names of the matrices with a row for each token: embedding, LM head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    named = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return [named[id(module)] for module in modules if module is not None]
