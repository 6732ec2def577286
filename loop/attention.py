"""Attention over several examples in one row, each by itself: no padding, and none sees another."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

PER_EXAMPLE = "sdpa_per_example"
# Layers of these kinds look at other positions of a row through attention alone.
PLAIN_LAYERS = {"full_attention", "sliding_attention"}
# Tokens. Of shorter dialogues PyTorch 2.13's backward pass is slower in bf16 than in fp32 on CPUs,
# 2.7 ms for 0.7 at 85 tokens (benchmarks/profile.md).
BF16_PAYS = 512


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


def row_inputs(lengths: Sequence[int], flash: bool) -> dict[str, Any]:
    """Return what tells a model where the examples of a row begin: positions [1, T], and lengths.

    FlashAttention-2 takes the places instead, int32 [B + 1] (transformers 5.23,
    modeling_flash_attention_utils.py); without them it would look for them in every layer.
    """
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    if not flash:
        return {"position_ids": positions, "lengths": tuple(lengths)}
    places = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ends = {f"cu_seq_lens_{side}": places for side in "qk"}
    return {"position_ids": positions, **ends, **{f"max_length_{s}": max(lengths) for s in "qk"}}


def per_example(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Run PyTorch's attention on each example of the row: queries [1, heads, T, d] to [1, T, ...].

    Without lengths it is transformers' own; it then needs rows without padding.
    """
    # Here, since it imports much that a command without a model does not need.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if lengths is None:
        whole: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return whole, None
    dtype = query.dtype
    on_cpu = query.device.type == "cpu" and dtype == torch.bfloat16
    if on_cpu:
        query, key, value = query.float(), key.float(), value.float()
    rows = zip(*(torch.split(x, [*lengths], 2) for x in (query, key, value)), strict=True)
    found = []
    # Else autocast would go back to bf16.
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        for q, k, v in rows:
            if on_cpu and q.shape[2] >= BF16_PAYS:
                q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
            band = _band(q, sliding_window)
            row = sdpa_attention_forward(module, q, k, v, band, **options)[0]
            found.append(row.float() if on_cpu else row)
    return torch.cat(found, 1).to(dtype), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """Return which keys each query may see [T, T], where a sliding window hides some of them."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=query.device)
    behind = places[:, None] - places
    return (behind >= 0) & (behind < window)
