"""Attention over several examples in one row, each by itself: no padding, and none sees another."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from data.batching.collate import Groups
from data.errors import UserError

PER_EXAMPLE = "sdpa_per_example"
# Layers of these kinds look at other positions of a row through attention alone.
PLAIN_LAYERS = {"full_attention", "sliding_attention"}
# Tokens. Of shorter dialogues PyTorch 2.13's backward pass is slower in bf16 than in fp32 on CPUs,
# 2.7 ms for 0.7 at 85 tokens (benchmarks/profile.md).
BF16_PAYS = 512
# Tokens of an example. With a mask PyTorch's kernel computes what causal attention leaves out, so
# that longer ones gain only where they share most; the mask, kept in memory, is their square.
MASK_PAYS, MASK_MOST = 400, 1024
# Code that does not hand on to its attention what the model is called with, or calls it otherwise
# (transformers 5.23).
DEAF = {"nemotron", "afmoe", "doge"}


def can_pack(base_config: Any) -> bool:
    """Whether the model mixes positions in attention alone, and in a function that we can give it.

    Others, such as Mamba's, and code that comes with the model, are run padded.
    """
    if (
        base_config.is_encoder_decoder
        or type(base_config) not in AutoModelForCausalLM._model_mapping
    ):
        return False
    kind = AutoModelForCausalLM._model_mapping[type(base_config)]
    layers = getattr(base_config, "layer_types", None) or []
    return bool(
        # The first says that what a model is called with reaches its attention (transformers 5.23).
        kind._supports_attention_backend
        and kind._supports_sdpa
        and base_config.model_type not in DEAF
        and {*layers} <= PLAIN_LAYERS
        and not getattr(base_config, "attn_logit_softcapping", None)
    )


def implementation(packed: bool, flash: bool, compiled: bool = False) -> str:
    """Return transformers' name of the attention that a run uses, made known to it."""
    if flash:
        return "flash_attention_2"
    if packed:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # Compiled, it would be made anew for each set of lengths.
        plain: Any = torch.compiler.disable  # untyped
        attention = plain(per_example) if compiled else per_example
        ALL_ATTENTION_FUNCTIONS.register(PER_EXAMPLE, attention)
    return PER_EXAMPLE if packed else "sdpa"


@dataclass(frozen=True, eq=False)
class Row:
    """The groups of a row; torch.compile makes layers anew for other numbers, but not for these."""

    groups: Groups


def row_inputs(groups: Groups, flash: bool) -> dict[str, Any]:
    """Return what tells a model where the examples of a row begin: positions [1, T], and the row.

    FlashAttention-2 takes the places instead, int32 [B + 1] (transformers 5.23,
    modeling_flash_attention_utils.py); without them it would look for them in every layer. Its
    examples share nothing.
    """
    spans = [
        span
        for shared, *own in groups
        for span in [(0, shared), *((shared, shared + length) for length in own)]
    ]
    positions = torch.cat([torch.arange(*span) for span in spans])[None]
    if not flash:
        return {"position_ids": positions, "row": Row(groups)}
    lengths = [length for _, *own in groups for length in own]
    places = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ends = {f"cu_seq_lens_{side}": places for side in "qk"}
    return {"position_ids": positions, **ends, **{f"max_length_{s}": max(lengths) for s in "qk"}}


def per_example(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    row: Row | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Run PyTorch's attention on each example of the row: queries [1, heads, T, d] to [1, T, ...].

    What a group shares is before each of its examples. Without a row it is transformers' own, which
    needs rows without padding. Raises UserError where a token sees what comes later.
    """
    # Here, since it imports much that a command without a model does not need.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if row is None:
        mask = _seen(query, key.shape[2], sliding_window) if mask is None else mask
        whole: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return whole, None
    if not getattr(module, "is_causal", True):
        raise UserError(
            f"found {type(module).__name__}, in which tokens see later ones; expected a causal "
            "model. Set is_decoder in its config.json, or train another model."
        )
    dtype, on_cpu = query.dtype, query.device.type == "cpu"
    upcast = on_cpu and dtype == torch.bfloat16
    if upcast:
        query, key, value = query.float(), key.float(), value.float()
    found = []
    # Else autocast would go back to bf16.
    with torch.autocast("cpu", enabled=False) if upcast else nullcontext():
        for q, k, v, new in _examples(row.groups, on_cpu, query, key, value):
            if upcast and q.shape[2] >= BF16_PAYS:
                q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
            seen = _seen(q, k.shape[2], sliding_window)
            attend = sdpa_attention_forward if q.shape[2] == k.shape[2] else _behind
            made = attend(module, q, k, v, seen, **options)[0][:, -new:]
            found.append(made.float() if upcast else made)
    return torch.cat(found, 1).to(dtype), None


def _examples(
    groups: Groups, on_cpu: bool, *whole: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Yield each example's queries, keys and values, and for how many places an output is new.

    On a CPU an example asks no query again that one before it of its group has asked, where that
    pays. Where some are copied, all are: the backward pass keeps them, not the whole row beside.
    """
    lengths = [length for group in groups for length in group]
    parts = zip(*(torch.split(x, lengths, 2) for x in whole), strict=True)
    copied = any(shared for shared, *_ in groups)
    for shared, *own in groups:
        beginning = next(parts)
        for number, (q, k, v) in enumerate(islice(parts, len(own))):
            length, pays = shared + own[number], MASK_MOST if shared >= own[number] else MASK_PAYS
            if not shared:
                yield *((x.clone() if copied else x) for x in (q, k, v)), length
                continue
            k, v = torch.cat([beginning[1], k], 2), torch.cat([beginning[2], v], 2)
            if number and on_cpu and length <= pays:
                yield q.clone(), k, v, own[number]
            else:
                q = torch.cat([beginning[0], q], 2)
                yield q, k, v, own[number] if number else length


def _behind(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Run attention of an example's last queries, which see keys before their own.

    transformers 5.23 (integrations/sdpa_attention.py) would write each key and value once for each
    head where there is a mask; that of a CPU's kernel is not needed.
    """
    row = nn.functional.scaled_dot_product_attention(
        query, key, value, seen, dropout, scale=scaling, enable_gqa=True
    )
    return row.transpose(1, 2), None


def _seen(query: Tensor, length: int, window: int | None) -> Tensor | None:
    """Return which of the keys each query may see [t, length]; None where it is all before it."""
    if window is not None and length > window:
        places = torch.arange(length, device=query.device)
        behind = places[-query.shape[2] :, None] - places
        return (behind >= 0) & (behind < window)
    if query.shape[2] == length:
        return None
    return _causal(-(-length // 256) * 256, query.dtype)[length - query.shape[2] : length, :length]


@lru_cache(4)
def _causal(size: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores [size, size], one tensor for all layers' backward passes.

    Of true and false PyTorch's kernel would make such a tensor in each call and keep it.
    """
    with torch.inference_mode(False):  # or a backward pass could not use what an evaluation made
        return torch.full((size, size), -math.inf, dtype=dtype).triu(1)
