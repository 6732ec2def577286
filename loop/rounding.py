"""Rounds changed matrices to 16 bits so that what they compute changes little.

To nearest, each weight's error stands by itself. Here it is carried to weights of the same row that
are yet to be rounded, as far as the layer's inputs tell that they can make up for it.
"""

from collections import defaultdict
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from data.encode import Example
from loop.deltas import Change
from loop.proof import logits_of

DAMPING = 0.01  # of the mean squared input, as in GPTQ: https://arxiv.org/abs/2210.17323
ROWS = 4096  # of a matrix at a time, for its memory


def changed_layers(model: nn.Module, changes: dict[str, Change]) -> list[str]:
    """Return the names of the linear layers whose weights are changed as a whole."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    changed = {name: changes.get(f"{name}.weight") for name in linear}
    return [name for name, change in changed.items() if change and change.rows is None]


def inputs_of(
    model: PeftModel, layers: list[str], examples: list[Example], most_bytes: float
) -> dict[str, list[Tensor]]:
    """Return what linear layers are given, of each text a tensor [T, in] bfloat16.

    As many texts are run as `most_bytes` hold, one at least. Layers that are given the same
    tensor, as q_proj and v_proj are, share what is kept.
    """
    modules = dict(model.get_base_model().named_modules())
    found: dict[str, list[Tensor]] = defaultdict(list)
    last: list[tuple[Tensor, Tensor]] = []

    def recorder(name: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            given = arguments[0]
            if not last or last[0][0] is not given:
                last[:] = [(given, given.flatten(0, -2).bfloat16())]
            found[name].append(last[0][1])

        return record

    handles = [modules[layer].register_forward_pre_hook(recorder(layer)) for layer in layers]
    try:
        for number, example in enumerate(examples, 1):
            logits_of(model, [example])
            kept = {id(part): part.nbytes for parts in found.values() for part in parts}
            if sum(kept.values()) * (number + 1) / number > most_bytes:
                break
    finally:
        for handle in handles:
            handle.remove()
    return found


def rounded(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` [out, in] float32 in `dtype`, for inputs [T, in].

    Column by column, of which the largest inputs come first: each takes up what the columns before
    it have lost, by the factor of inputsᵀ inputs (LDLQ: https://arxiv.org/abs/2307.13304).
    """
    inputs = torch.nn.functional.normalize(inputs.float())
    products = inputs.T @ inputs
    squares = products.diagonal()
    if not bool(squares.mean() > 0):
        return weight.to(dtype)
    squares += DAMPING * squares.mean()
    order = squares.argsort(descending=True)
    # Cholesky's factor is lower triangular; of the matrix turned round it is upper triangular.
    turned = products[order][:, order].flip(0, 1)
    factor = torch.linalg.cholesky(turned).flip(0, 1)
    factor /= factor.diagonal().clone()
    found = torch.empty_like(weight, dtype=dtype)
    for start in range(0, len(weight), ROWS):
        part = weight[start : start + ROWS].T[order]
        aims = part.clone()
        _carry(aims, torch.empty_like(part), part, factor, dtype)
        found[start : start + ROWS, order] = aims.T.to(dtype)
    return found


def _carry(
    aims: Tensor, errors: Tensor, weight: Tensor, factor: Tensor, dtype: torch.dtype
) -> None:
    """Fill the errors [in, out] of `weight` [in, out], and what is to be rounded in its place.

    Halves of halves, so that most of the work is in products of large matrices.
    """
    if len(aims) == 1:
        torch.sub(weight, aims.to(dtype).float(), out=errors)
        return
    half = len(aims) // 2
    _carry(aims[:half], errors[:half], weight[:half], factor[:half, :half], dtype)
    aims[half:].addmm_(factor[:half, half:].T, errors[:half])
    _carry(aims[half:], errors[half:], weight[half:], factor[half:, half:], dtype)
