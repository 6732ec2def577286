"""Rounds merged matrices to 16 bits so that the outputs of their layers change little.

Rounding to nearest ignores how errors add up in an output. Here, the weights of a row that are not
yet rounded compensate the errors of the rounded ones, weighted by the layer's inputs.
"""

import math
from collections import defaultdict
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from data.encoding.encode import Example
from loop.adapters.compare_logits import in_fp32, run
from loop.adapters.merge_rules import Change

DAMPING = 0.01  # of the mean squared input, as in GPTQ: https://arxiv.org/abs/2210.17323
ROWS_AT_ONCE = 4096  # rows of a matrix; bounds the memory


def changed_layers(model: nn.Module, changes: dict[str, Change]) -> list[str]:
    """Return the names of the linear layers whose full weight changes, not only new rows."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    changed = {name: changes.get(f"{name}.weight") for name in linear}
    return [name for name, change in changed.items() if change and change.rows is None]


def inputs_of(
    model: PeftModel, layers: list[str], examples: list[Example], max_bytes: float
) -> dict[str, list[Tensor]]:
    """Return the linear layers' inputs, a tensor [T, in] bfloat16 for each text.

    If all tokens take more than `max_bytes`, every n-th token of a text is kept. Layers with the
    same input, such as q_proj and v_proj, share the kept tensor.
    """
    if not layers:
        return {}
    named = model.get_base_model().named_modules()
    modules = {name.replace(".modules_to_save.default", ""): module for name, module in named}
    recorded: dict[str, list[Tensor]] = defaultdict(list)
    last: list[tuple[Tensor, Tensor]] = []

    def recorder(name: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if not last or last[0][0] is not arguments[0]:
                last[:] = [(arguments[0], arguments[0].flatten(0, -2).bfloat16())]
            recorded[name].append(last[0][1])

        return record

    inputs: dict[str, list[Tensor]] = defaultdict(list)
    handles = [modules[layer].register_forward_pre_hook(recorder(layer)) for layer in layers]
    try:
        with torch.inference_mode(), in_fp32(model):
            for example in examples:
                run(model, example)
                kept = _thinned(recorded, max_bytes / len(examples))
                for name, parts in recorded.items():
                    inputs[name] += [kept[id(part)] for part in parts]
                recorded.clear()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _thinned(recorded: dict[str, list[Tensor]], max_bytes: float) -> dict[int, Tensor]:
    """Return every n-th row of each tensor [T, in], by the tensor's id: about `max_bytes` in all.

    At least one row of each tensor is kept. The result is empty if no router sends the text to
    these layers. All results are views of one block, since many small blocks fragment the memory.
    """
    parts = {id(part): part for own in recorded.values() for part in own}
    if not parts:
        return {}
    size = sum(part.nbytes for part in parts.values())
    thin = [part[:: max(math.ceil(size / max_bytes), 1)] for part in parts.values()]
    block = torch.cat([part.flatten() for part in thin])
    cuts = torch.split(block, [part.numel() for part in thin])
    return {key: cut.view(part.shape) for key, cut, part in zip(parts, cuts, thin, strict=True)}


def rounded(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` [out, in] float32 rounded to `dtype` with the layer's inputs [T, in].

    Columns are rounded one by one, starting with the one with the largest inputs. Each column
    compensates the errors of the columns before it, by the Cholesky factor of inputsᵀ inputs
    (LDLQ: https://arxiv.org/abs/2307.13304).
    """
    inputs = nn.functional.normalize(inputs.float())
    squares = inputs.square().sum(dim=0)
    if not bool(squares.mean() > 0):
        return weight.to(dtype)
    order = squares.argsort()  # The last is rounded first, since the factor is lower triangular.
    inputs = inputs[:, order]
    products = inputs.T @ inputs
    products.diagonal().add_(DAMPING * squares.mean())
    factor = torch.linalg.cholesky(products, out=products)
    factor /= factor.diagonal().clone()
    result = torch.empty_like(weight, dtype=dtype)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = weight[start : start + ROWS_AT_ONCE].T[order]
        targets = part.clone()
        _compensate(targets, torch.empty_like(part), part, factor, dtype)
        result[start : start + ROWS_AT_ONCE, order] = targets.T.to(dtype)
    return result


def _compensate(
    targets: Tensor, errors: Tensor, weight: Tensor, factor: Tensor, dtype: torch.dtype
) -> None:
    """Add the compensation of errors to `targets`, a copy of `weight`, and fill `errors`.

    All tensors are [in, out]. The caller rounds `targets` instead of `weight`. The recursion halves
    the matrix and starts with the last half, so that most work is in products of large matrices.
    """
    if len(targets) == 1:
        torch.sub(weight, targets.to(dtype).float(), out=errors)
        return
    half = len(targets) // 2
    _compensate(targets[half:], errors[half:], weight[half:], factor[half:, half:], dtype)
    targets[:half].addmm_(factor[half:, :half].T, errors[half:])
    _compensate(targets[:half], errors[:half], weight[:half], factor[:half, :half], dtype)
