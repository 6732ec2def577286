"""Rounds changed matrices to 16 bits so that what they compute changes little.

To nearest, each weight's error stands by itself. Here it is carried to weights of the same row that
are yet to be rounded, as far as the layer's inputs tell that they can make up for it.
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

    Where `most_bytes` do not hold all tokens, every second, third or n-th of a text is kept. Layers
    that are given the same tensor, as q_proj and v_proj are, share what is kept.
    """
    if not layers:
        return {}
    named = model.get_base_model().named_modules()
    modules = {name.replace(".modules_to_save.default", ""): module for name, module in named}
    given: dict[str, list[Tensor]] = defaultdict(list)
    last: list[tuple[Tensor, Tensor]] = []

    def recorder(name: str) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if not last or last[0][0] is not arguments[0]:
                last[:] = [(arguments[0], arguments[0].flatten(0, -2).bfloat16())]
            given[name].append(last[0][1])

        return record

    found: dict[str, list[Tensor]] = defaultdict(list)
    handles = [modules[layer].register_forward_pre_hook(recorder(layer)) for layer in layers]
    try:
        with torch.inference_mode(), in_fp32(model):
            for example in examples:
                run(model, example)
                kept = _thinned(given, most_bytes / len(examples))
                for name, parts in given.items():
                    found[name] += [kept[id(part)] for part in parts]
                given.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _thinned(given: dict[str, list[Tensor]], most_bytes: float) -> dict[int, Tensor]:
    """Return every n-th row of each tensor [T, in], by the tensor's id: about `most_bytes` in all.

    One row of each at least, and nothing of a text that no router has sent to these layers. They
    lie in one block: many small ones would cut up the memory that a text's run frees.
    """
    parts = {id(part): part for own in given.values() for part in own}
    if not parts:
        return {}
    size = sum(part.nbytes for part in parts.values())
    thin = [part[:: max(math.ceil(size / most_bytes), 1)] for part in parts.values()]
    block = torch.cat([part.flatten() for part in thin])
    cuts = torch.split(block, [part.numel() for part in thin])
    return {key: cut.view(part.shape) for key, cut, part in zip(parts, cuts, thin, strict=True)}


def rounded(weight: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` [out, in] float32 in `dtype`, for inputs [T, in].

    Column by column, of which the largest inputs come first: each takes up what the columns before
    it have lost, by the factor of inputsᵀ inputs (LDLQ: https://arxiv.org/abs/2307.13304).
    """
    inputs = nn.functional.normalize(inputs.float())
    squares = inputs.square().sum(dim=0)
    if not bool(squares.mean() > 0):
        return weight.to(dtype)
    order = squares.argsort()  # the first to be rounded is the last: the factor is lower triangular
    inputs = inputs[:, order]
    products = inputs.T @ inputs
    products.diagonal().add_(DAMPING * squares.mean())
    factor = torch.linalg.cholesky(products, out=products)
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

    Halves of halves, the last first, so that most of the work is in products of large matrices.
    """
    if len(aims) == 1:
        torch.sub(weight, aims.to(dtype).float(), out=errors)
        return
    half = len(aims) // 2
    _carry(aims[half:], errors[half:], weight[half:], factor[half:, half:], dtype)
    aims[:half].addmm_(factor[half:, :half].T, errors[half:])
    _carry(aims[:half], errors[:half], weight[:half], factor[:half, :half], dtype)
