"""Embedding and LM head rows of new tokens, trained and saved with the adapter.

peft stores the rows as trainable tokens in the adapter's files (0.21,
tuners/trainable_tokens/layer.py). This module sets the layers, initial values and forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from types import MethodType
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn

from data.errors import UserError
from loop.utils import Tensors, gathered, use_whole

ROWS_MULTIPLE = 8  # A grown matrix has a multiple of 8 rows, with which GPUs multiply faster.


def grow(model: Any, tokens: int) -> None:
    """Grow embedding and LM head to at least one row per token; new rows are the old rows' mean.

    transformers' `resize_token_embeddings` (5.23) would also shrink the matrices, and tie Flan-T5's
    separate LM head to the embedding.
    """
    for old in {id(m.weight): m.weight for m in _matrices(model)}.values():
        if getattr(old, "ds_shape", old.shape)[0] >= tokens:
            continue
        with gathered(old), torch.no_grad():
            new = nn.Parameter(grown(old, tokens), requires_grad=False)
        for module in model.modules():
            if getattr(module, "weight", None) is old:
                module.weight = new
                name = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
                setattr(module, name, len(new))
        model.config.vocab_size = len(new)
        if hasattr(model, "final_logits_bias"):  # BART and Marian: one element per LM head row
            model._resize_final_logits_bias(len(new))


def grown(matrix: Tensor, tokens: int) -> Tensor:
    """Return the matrix [rows, d] with at least one row per token; new rows are the old mean."""
    more = rows_needed(len(matrix), tokens) - len(matrix)
    if not more:
        return matrix
    mean = matrix.float().mean(0).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(more, -1)])


def rows_needed(rows: int, tokens: int) -> int:
    """Return the number of rows after `grown`."""
    return rows if rows >= tokens else ceil(tokens / ROWS_MULTIPLE) * ROWS_MULTIPLE


def first_values(model: Any, tokens: list[int]) -> dict[str, Tensor]:
    """Return the mean of the old tokens' rows: embedding (`input`), LM head (`output`), each [d].

    Every rank must call this, since ZeRO-3 gathers the rows.
    """
    means = {}
    for name, matrix in zip(("input", "output"), _matrices(model), strict=True):
        with gathered(matrix.weight), torch.no_grad():
            means[name] = matrix.weight[: tokens[0]].float().mean(0)
    return means


def places(model: Any, tokens: list[int]) -> dict[str, list[int]]:
    """Return peft's `trainable_token_indices`: the tokens whose rows are trained, by module name.

    If embedding and LM head share one matrix, peft ties their rows. It would also tie Flan-T5's
    separate LM head, since transformers declares every T5's head as tied. But it does not tie
    modules that list the tokens in different orders (0.21, utils/other.py, `indices_mismatch`). So
    a separate head lists them reversed, which needs two tokens (data/encoding/tokenizer.py,
    COMPANION).
    """
    embedding, head = _matrices(model)
    names = {id(module): name for name, module in model.named_modules()}
    if head.weight is embedding.weight:
        return {names[id(embedding)]: tokens}
    embeddings = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is embedding.weight
    ]
    chosen = [name for name in embeddings if name != names[id(embedding)]] or embeddings
    return {**dict.fromkeys(chosen, tokens), names[id(head)]: tokens[::-1]}


def check_targets(taken: dict[str, list[int]], targets: tuple[str, ...]) -> None:
    """Raise UserError for a LoRA target whose new tokens' rows are trained.

    peft trains either rows or a LoRA pair of a module, not both (0.21, `_set_trainable`).
    """
    both = [t for t in targets if any(f".{name}".endswith(f".{t}") for name in taken)]
    if both:
        raise UserError(
            f"--lora_target_modules: found {', '.join(both)}, whose rows of new tokens are "
            "trained already; expected other modules. Leave it out."
        )


@contextmanager
def without_collectives() -> Iterator[None]:
    """Make peft create zero rows instead of gathering them from a matrix partitioned by ZeRO-3.

    peft's gather works on a CUDA device only (0.21, `_collect_token_weights`).
    """
    collect = TrainableTokensLayer._collect_token_weights

    def zeros(_: Any, weight: Tensor, rows: Any, width: int) -> Tensor:
        return weight.new_zeros(len(rows), width)

    TrainableTokensLayer._collect_token_weights = zeros
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = collect


def set_up(
    model: nn.Module, values: dict[str, Tensor] | None, train: bool, sharded: bool = False
) -> None:
    """Initialise the rows that peft injected, tie them like the matrices, replace their forward.

    values: from `first_values`; None keeps the rows of a loaded adapter. train: whether the rows
    are trained. sharded: whether ZeRO-3 partitions the rows.
    """
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    first: TrainableTokensLayer | None = None
    for layer in layers:
        embeds = isinstance(layer.get_base_layer(), nn.Embedding)
        if embeds and not layer.tied_adapter:
            if first is not None:  # Encoder and decoder share one embedding matrix.
                layer.trainable_tokens_delta = first.trainable_tokens_delta
            first = first or layer
        for rows in layer.trainable_tokens_delta.values():
            if values is not None and not layer.tied_adapter:
                value = values["input" if embeds else "output"]
                rows.data.copy_(value.to(rows).expand_as(rows))
            rows.requires_grad_(train)
            if sharded:
                use_whole(layer, rows)
        layer.forward = MethodType(_forward, layer)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Apply the frozen matrix, then replace the new tokens' outputs.

    peft's forward copies the complete matrix, and its backward pass creates a gradient of that
    size.
    """
    result: Tensor = self.base_layer(x, *args, **kwargs)
    if self.disable_adapters or self.merged:
        return result
    for name in self.active_adapters:
        rows = self.trainable_tokens_delta[name]
        tokens = torch.tensor(self.token_indices[name], device=x.device)
        if isinstance(self.base_layer, nn.Embedding):
            chosen = x[..., None] == tokens
            scale = self._get_embed_scale()  # BART's and mBART's
            new = chosen.to(rows.dtype) @ (rows if scale is None else rows * scale.to(rows))
            new = new.to(result.dtype)
            result = torch.where(chosen.any(-1, keepdim=True), new, result)
        else:
            new = nn.functional.linear(x, rows.to(x.dtype)).to(result.dtype)
            result = result.index_copy(-1, tokens, new)
    return result


def rows(model: nn.Module, trained: Tensors, keep: bool) -> Tensors:
    """Return the trained parameters and all new rows, also frozen ones, by peft's names.

    Rows are rounded to their matrix's dtype, in which `_forward` and peft compute. So a merged
    model has the same values. Every rank must call this; a rank without `keep` returns nothing.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = dict(trained)
    for name, layer in _owners(model).items():
        for adapter, parameter in layer.trainable_tokens_delta.items():
            value = trained.get(names[id(parameter)])
            if not parameter.requires_grad:
                with gathered(parameter):
                    value = parameter.detach().to("cpu", torch.float32, copy=True)
            if keep and value is not None:
                rounded = value.to(layer.get_base_layer().weight.dtype)
                found[f"{name}.trainable_tokens_delta.{adapter}"] = rounded.float().clone()
    return found if keep else {}


def row_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all new rows, by the rows' names in the adapter's file."""
    return {
        f"{name}.trainable_tokens_delta": tuple(getattr(rows, "ds_shape", rows.shape))
        for name, layer in _owners(model).items()
        for rows in layer.trainable_tokens_delta.values()
    }


def replaced(model: nn.Module) -> dict[int, tuple[list[int], str]]:
    """Return each matrix's new tokens and their rows' name in `rows`, by the `id` of the matrix."""
    return {
        id(layer.get_base_layer().weight): (tokens, f"{name}.trainable_tokens_delta.{adapter}")
        for name, layer in _owners(model).items()
        for adapter, tokens in layer.token_indices.items()
    }


def check_rows(model: Any, tokens: list[int], folder: str) -> None:
    """Raise UserError if a loaded adapter has rows of other tokens than the run's new ones."""
    config = model.peft_config["default"]
    found = config.trainable_token_indices or {}
    found = found.values() if isinstance(found, dict) else [found]
    held = sorted({token for ids in found for token in ids})
    if held != tokens:
        raise UserError(
            f"--lora_weight_path {folder}: found rows of the tokens {held}; expected rows of "
            f"{tokens}, the tokenizer's new tokens. Give --t5_compat as in the adapter's training, "
            "or train a new adapter."
        )


def _matrices(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _owners(model: nn.Module) -> dict[str, Any]:
    """Return the layers whose rows are saved in the adapter's file, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensLayer) and not module.tied_adapter
    }
