"""Reads an adapter's change of each base tensor; rejects adapters that cannot be merged."""

import json
from collections import defaultdict
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from data.errors import UserError
from loop.adapters.stored_names import AdaptedParameter, adapted_parameters
from loop.config.flags import ADAPTER_FILES

PREFIX = "base_model.model."
A, B, EMBEDDING_A, EMBEDDING_B = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_embedding_A",
    "lora_embedding_B",
)
MAGNITUDE, ROWS = "lora_magnitude_vector", "token_adapter.trainable_tokens_delta"
KINDS = (A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, ROWS)
# Fields of peft's LoraConfig (0.21) that the merge supports, or that do not change weights. All
# other fields must have their defaults.
SUPPORTED_FIELDS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "modules_to_save"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "trainable_token_indices", "runtime_config", "ensure_weight_tying"),
    "target_parameters",
    *("megatron_core", "loftq_config", "eva_config"),
}
# Other values, such as "pissa", subtract the adapter's initial product from the base.
SUPPORTED_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Change:
    """The change of one tensor: a LoRA product to add, or rows or a full tensor to replace.

    product: lora_B [out, r], lora_A [r, in] and their scale, of an expert parameter with the
    experts as first dimension. transposed: the tensor is [in, out].
    magnitude: DoRA's, [out]. rows: [n, d] for the n `tokens`. replacement: the new tensor.
    """

    product: tuple[Tensor, Tensor, float] | None = None
    transposed: bool = False
    magnitude: Tensor | None = None
    tokens: tuple[int, ...] = ()
    rows: Tensor | None = None
    replacement: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the changed tensor, in fp32."""
        changed = tensor.float() if self.replacement is None else self.replacement.float()
        if self.product:
            b, a, scale = self.product
            delta = (b.float() @ a.float()) * scale
            changed = changed + (delta.transpose(-1, -2) if self.transposed else delta)
        if self.magnitude is not None:
            # https://arxiv.org/abs/2402.09353, equation 5, with a norm for each output.
            changed = changed * (self.magnitude.float() / changed.norm(dim=1))[:, None]
        if self.rows is not None:
            changed = changed.clone()
            changed[[*self.tokens]] = self.rows.float()
        return changed

    def same_rows(self, other: "Change") -> bool:
        """Return whether both changes are equal rows of the same tokens."""
        if self.rows is None or other.rows is None:
            return False
        return self.tokens == other.tokens and torch.equal(self.rows, other.rows)


def read_changes(folder: Path, model: nn.Module) -> dict[str, Change]:
    """Return the changes by the names of the base model's parameters.

    model: the base; only its modules and shapes are read. Raises UserError for an adapter that
    cannot be merged or does not fit the base.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    _check(config, folder)
    modules = dict(model.named_modules())
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)  # by module and kind
    changes: dict[str, Change] = {}
    names = {*model.state_dict()}
    for key, tensor in _weights(folder).items():
        name = key.removeprefix(PREFIX)
        kind = next((k for k in KINDS if name.endswith(f".{k}")), None)
        # Some releases of peft append the parameter's name.
        if name.endswith(f".{MAGNITUDE}.weight"):
            name, kind = name.removesuffix(".weight"), MAGNITUDE
        if kind:
            parts[name.removesuffix(f".{kind}")][kind] = tensor
            continue
        name = name.replace(".base_layer", "")
        if name not in names:
            raise _unknown(folder, key)
        changes[name] = Change(replacement=tensor)
    parameters = adapted_parameters(folder, model) if config.get("target_parameters") else {}
    for module, found in parts.items():
        if place := parameters.get(module):
            changes[place.name] = _parameter_change(place, found, folder)
            continue
        if module not in modules:
            raise _unknown(folder, f"{PREFIX}{module}")
        changes[f"{module}.weight"] = _change(modules[module], module, found, config, folder)
    return changes


def restore_fp32_values(model: PeftModel, changes: dict[str, Change]) -> None:
    """Set fully trained modules and biases to their saved fp32 values.

    peft (0.21) loads them in the base's dtype, which rounds them. It loads LoRA's weights in fp32.
    """
    for name, parameter in model.get_base_model().named_parameters():
        base_name = name.replace(".modules_to_save.default", "").replace(".base_layer", "")
        change = changes.get(base_name)
        if change and change.replacement is not None and "original_module" not in name:
            parameter.data = change.replacement.float()


def _change(
    module: nn.Module, name: str, found: dict[str, Tensor], config: dict[str, Any], folder: Path
) -> Change:
    linear, embedding = isinstance(module, nn.Linear), isinstance(module, nn.Embedding)
    kinds = {*found}
    if kinds == {ROWS} and (linear or embedding):
        return Change(tokens=_tokens(name, config, folder), rows=found[ROWS])
    transposed = isinstance(module, Conv1D)
    plain = MAGNITUDE not in kinds
    if kinds in ({A, B}, {A, B, MAGNITUDE}) and (linear or (transposed and plain)):
        b, a = found[B], found[A]
    elif kinds == {EMBEDDING_A, EMBEDDING_B} and embedding:
        b, a, transposed = found[EMBEDDING_B], found[EMBEDDING_A], True
    else:
        raise UserError(
            f"--adapter {folder}: {name}, a {type(module).__name__}, has {', '.join(sorted(kinds))}"
            "; expected LoRA's pair on a linear layer or an embedding. Use the adapter unmerged."
        )
    alpha = config.get("alpha_pattern") or {}
    alpha = alpha.get(get_pattern_key([*alpha], name), config["lora_alpha"])
    rank = len(a)
    scale = alpha / (sqrt(rank) if config.get("use_rslora") else rank)
    return Change(product=(b, a, scale), transposed=transposed, magnitude=found.get(MAGNITUDE))


def _parameter_change(place: AdaptedParameter, found: dict[str, Tensor], folder: Path) -> Change:
    if {*found} != {A, B}:
        raise _unknown(folder, f"{place.name}'s {', '.join(sorted(found))}")
    b, a = found[B], found[A]
    if place.experts > 1:  # peft 0.21, `ParamWrapper.get_delta_weight`
        a = a.reshape(place.experts, -1, a.shape[-1])
        b = b.reshape(len(b), -1, place.experts).permute(2, 0, 1)
    return Change(product=(b, a, place.scale), transposed=not place.out_first)


def _tokens(module: str, config: dict[str, Any], folder: Path) -> tuple[int, ...]:
    """Return the tokens of a module's new rows, in the order of the rows."""
    indices = config.get("trainable_token_indices")
    for name, tokens in indices.items() if isinstance(indices, dict) else [(module, indices)]:
        if tokens and f".{module}".endswith(f".{name}"):
            return tuple(tokens)
    raise _unknown(folder, f"{module}'s rows of new tokens")


def _check(config: dict[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"--adapter {folder}: found peft_type {kind}; expected LORA. Use the adapter unmerged."
        )
    defaults = LoraConfig()
    for key, value in config.items():
        if key not in SUPPORTED_FIELDS and value and value != getattr(defaults, key, None):
            raise UserError(
                f"--adapter {folder}: found {key} {json.dumps(value)}, which cannot be merged; "
                "expected plain LoRA, rsLoRA or DoRA. Use the adapter unmerged."
            )
    init = config.get("init_lora_weights", True)
    if init not in SUPPORTED_INITS:
        raise UserError(
            f"--adapter {folder}: found init_lora_weights {init}, which also changes the base; "
            "expected an adapter that leaves the base as it is. Convert it (peft's "
            "path_initial_model_for_weight_conversion)."
        )


def _weights(folder: Path) -> dict[str, Tensor]:
    safe, pickled = (folder / name for name in ADAPTER_FILES)
    if safe.is_file():
        return load_file(safe)
    if not pickled.is_file():
        raise UserError(
            f"--adapter {folder}: found no weights; expected {safe.name}. Give an adapter's folder."
        )
    loaded: dict[str, Tensor] = torch.load(pickled, weights_only=True)
    return loaded


def _unknown(folder: Path, name: str) -> UserError:
    return UserError(
        f"--adapter {folder}: found {name}, which the base model does not have; expected an "
        "adapter of this base. Give --base, the model that it was trained on."
    )
