"""A base model's tensors, one at a time: from its files, or out of 4-bit weights."""

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
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from data.errors import UserError
from loop.adapters.adapter import Adapter
from loop.model.base import as_user_error

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Tensors by their names, of which one is read when it is asked for.

    dtype: that of most of them.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], Tensor]


def skeleton_of(adapter: Adapter) -> nn.Module:
    """Return the base model without weights."""
    loader = AutoModelForSeq2SeqLM if adapter.pairs else AutoModelForCausalLM
    code = adapter.hub["trust_remote_code"]
    with as_user_error(adapter.base), torch.device("meta"):
        model: nn.Module = loader.from_config(adapter.base_config, trust_remote_code=code)
    return model


def folder_of(adapter: Adapter) -> Path:
    """Return where the base's files lie, fetched from the hub if need be; raises UserError."""
    folder = Path(adapter.base)
    if not folder.is_dir():
        with as_user_error(adapter.base):
            wanted = ["*.safetensors", "*.json", "*.py"]
            cache = adapter.hub["cache_dir"]
            folder = Path(snapshot_download(adapter.base, allow_patterns=wanted, cache_dir=cache))
    return folder


def tensors_in(folder: Path) -> Source:
    """Return what the folder's safetensors files hold; raises UserError where there are none.

    Each tensor is read through a mapping of its own, so that none stays in memory.
    """
    index = folder / INDEX
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif (folder / WEIGHTS).is_file():
        with safe_open(folder / WEIGHTS, "pt") as file:
            places = dict.fromkeys(file.keys(), WEIGHTS)
    else:
        raise UserError(
            f"{folder}: holds no {WEIGHTS}; expected safetensors. Load the model with transformers "
            "and save it again, with save_pretrained."
        )
    shapes: dict[str, tuple[int, ...]] = {}
    elements: dict[torch.dtype, int] = defaultdict(int)
    for name in sorted({*places.values()}):
        with as_user_error(str(folder / name)), safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no dict
                found = file.get_slice(key)
                shapes[key] = tuple(found.get_shape())
                if found.get_dtype() in STORED:
                    elements[STORED[found.get_dtype()]] += torch.Size(shapes[key]).numel()

    def read(key: str) -> Tensor:
        with safe_open(folder / places[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    return Source(shapes, max(elements, key=elements.__getitem__), read)


def tensors_of(model: Any) -> Source:
    """Return a loaded model's tensors, the 4-bit ones as what they compute with."""
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
    """Return by which name of the source each of the model's tensors is stored.

    Several modules may share a matrix, which is stored once, or several times with the same values.
    Flan-T5's LM head has values of its own, although its configuration says that it shares them.
    """
    groups: dict[int, list[str]] = defaultdict(list)
    for name, tensor in skeleton.state_dict(keep_vars=True).items():
        groups[id(tensor)].append(name)
    head_names = vocabulary_names(skeleton)[1:]
    found: dict[str, str] = {}
    for names in groups.values():
        stored = [name for name in names if name in source.shapes]
        stored.sort(key=lambda name: name in head_names)  # the embedding's first
        own = stored[:1]
        for name in stored[1:]:
            values = source.read(name)
            same = [known for known in own if torch.equal(source.read(known), values)]
            own += [] if same else [name]
            found[name] = same[0] if same else name
        for name in names:
            if own:
                found.setdefault(name, own[0])
    return found


def vocabulary_names(model: Any) -> list[str]:
    """Return the names of the matrices with a row for each token: embedding, and LM head."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    named = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return [named[id(module)] for module in modules if module is not None]
