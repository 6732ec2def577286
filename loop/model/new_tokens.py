"""The rows of tokens that the base model lacks: trained and saved with the adapter, and no others.

peft's trainable tokens (0.21, tuners/trainable_tokens/layer.py) give them their place in the
adapter's files. How they are laid out, begun and run is decided here.
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

MULTIPLE = 8  # rows of a grown matrix, which GPUs multiply faster so


def grow(model: Any, tokens: int) -> None:
    """Give embedding and LM head a row for each token, where they have fewer; never shrink them.

    The new rows are the mean of the old ones. transformers' own `resize_token_embeddings` (5.23)
    also shrinks, and ties T5's LM head, a matrix of its own in Flan-T5, to the embedding.
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
        if hasattr(model, "final_logits_bias"):  # BART's and Marian's, of the LM head's length
            model._resize_final_logits_bias(len(new))


def grown(matrix: Tensor, tokens: int) -> Tensor:
    """Return a matrix with a row for each token, [rows, d]; the new ones are the others' mean."""
    more = rows_needed(len(matrix), tokens) - len(matrix)
    if not more:
        return matrix
    mean = matrix.float().mean(0).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(more, -1)])


def rows_needed(rows: int, tokens: int) -> int:
    """Return how many rows a matrix has once there is one for each token."""
    return rows if rows >= tokens else ceil(tokens / MULTIPLE) * MULTIPLE


def first_values(model: Any, tokens: list[int]) -> dict[str, Tensor]:
    """Return the means of the rows before the new tokens': `input` and `output`, each [d].

    Every rank must call this: under ZeRO-3 the rows are gathered.
    """
    means = {}
    for name, matrix in zip(("input", "output"), _matrices(model), strict=True):
        with gathered(matrix.weight), torch.no_grad():
            means[name] = matrix.weight[: tokens[0]].float().mean(0)
    return means


def places(model: Any, tokens: list[int]) -> dict[str, list[int]]:
    """Return peft's `trainable_token_indices`: whose rows are replaced, by the modules' names.

    Where all share one matrix, peft ties them by itself. It would tie Flan-T5's LM head, too, since
    transformers says that every T5's is tied; of modules whose tokens differ in their order it
    believes that they are not (0.21, utils/other.py, `indices_mismatch`). So there are always two
    tokens at least (data/encoding/tokenizer.py, COMPANION).
    """
    embedding, head = _matrices(model)
    names = {id(module): name for name, module in model.named_modules()}
    if head.weight is embedding.weight:
        return {names[id(embedding)]: tokens}
    readers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module.weight is embedding.weight
    ]
    own = [name for name in readers if name != names[id(embedding)]] or readers
    return {**dict.fromkeys(own, tokens), names[id(head)]: tokens[::-1]}


def check_targets(taken: dict[str, list[int]], targets: tuple[str, ...]) -> None:
    """Raise UserError for a module that is to have both rows of new tokens and a LoRA pair.

    peft has a place for one of the two (0.21, `_set_trainable`).
    """
    both = [t for t in targets if any(f".{name}".endswith(f".{t}") for name in taken)]
    if both:
        raise UserError(
            f"--lora_target_modules: found {', '.join(both)}, which has the rows of new tokens; "
            "expected other modules. Leave it out: these rows are trained."
        )


@contextmanager
def without_collectives() -> Iterator[None]:
    """Have peft make its rows without reading the matrix, which ZeRO-3 may have shared out.

    Its own way asks for a CUDA device, on a CPU too (0.21, `_collect_token_weights`).
    """
    kept = TrainableTokensLayer._collect_token_weights

    def zeros(_: Any, weight: Tensor, rows: Any, width: int) -> Tensor:
        return weight.new_zeros(len(rows), width)

    TrainableTokensLayer._collect_token_weights = zeros
    try:
        yield
    finally:
        TrainableTokensLayer._collect_token_weights = kept


def set_up(
    model: nn.Module, values: dict[str, Tensor] | None, train: bool, sharded: bool = False
) -> None:
    """Make injected rows ready: `values` to begin with, tied where the matrices are, fast to run.

    Without values they stay as they are: an adapter's that was loaded. `sharded`: by ZeRO-3.
    """
    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    first: TrainableTokensLayer | None = None
    for layer in layers:
        embeds = isinstance(layer.get_base_layer(), nn.Embedding)
        if embeds and not layer.tied_adapter:
            if first is not None:  # The encoder's and the decoder's embedding are one matrix.
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
    """Run the frozen matrix as it is, and the new rows beside it.

    peft's own forward copies the matrix, and its backward pass makes a gradient of that size.
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
    """Return the trained parameters with all new rows, frozen ones too, as peft names them.

    Rows have the precision of their matrix, in which `_forward` computes with them, and peft's too:
    so a model that is merged has the very same. Every rank must call this; one that does not `keep`
    them takes part and returns nothing.
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
                as_run = value.to(layer.get_base_layer().weight.dtype)
                found[f"{name}.trainable_tokens_delta.{adapter}"] = as_run.float().clone()
    return found if keep else {}


def row_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each layer's rows by the name that it has in the adapter's file."""
    return {
        f"{name}.trainable_tokens_delta": tuple(getattr(rows, "ds_shape", rows.shape))
        for name, layer in _owners(model).items()
        for rows in layer.trainable_tokens_delta.values()
    }


def replaced(model: nn.Module) -> dict[int, tuple[list[int], str]]:
    """Return which rows of which matrix are replaced by what: by id, tokens and `rows`' name."""
    return {
        id(layer.get_base_layer().weight): (tokens, f"{name}.trainable_tokens_delta.{adapter}")
        for name, layer in _owners(model).items()
        for adapter, tokens in layer.token_indices.items()
    }


def check_rows(model: Any, tokens: list[int], folder: str) -> None:
    """Raise UserError where a loaded adapter's rows are not those of the run's new tokens."""
    config = model.peft_config["default"]
    found = config.trainable_token_indices or {}
    found = found.values() if isinstance(found, dict) else [found]
    held = sorted({token for ids in found for token in ids})
    if held != tokens:
        raise UserError(
            f"--lora_weight_path {folder}: found rows of the tokens {held}; expected those of "
            f"{tokens}, which the tokenizer was given. Give --t5_compat as it was trained with, or "
            "train a new adapter."
        )


def _matrices(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _owners(model: nn.Module) -> dict[str, Any]:
    """Return the layers whose rows are in the adapter's file, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensLayer) and not module.tied_adapter
    }
