"""Packed attention: examples share one row without padding, and none attends to another."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from data.batching.shared_prefix import Segments
from data.errors import UserError

PER_EXAMPLE = "sdpa_per_example"
# Layer types that mix the positions of a row in attention only.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Below this length, PyTorch 2.13's backward pass on CPUs is slower in bf16 than in fp32: 2.7 ms
# against 0.7 ms at 85 tokens (benchmarks/profile.md).
MIN_BF16_TOKENS = 512
# On a CPU, examples up to this length, prefix included, skip the queries of their shared prefix.
# Skipping needs a mask, and with a mask PyTorch's kernel computes the scores above the diagonal,
# too. So a longer example is faster only if the prefix is at least half of it. The second limit
# bounds the mask, whose size is the square of the length.
MAX_MASKED_TOKENS, MAX_MASKED_TOKENS_LONG_PREFIX = 400, 1024


def can_pack(base_config: Any) -> bool:
    """Return whether the model may run on packed rows; `check_model` proves it before step 1.

    It must mix positions in attention only, and call transformers' registered attention function.
    Other models, such as Mamba and remote code, run on padded rows.
    """
    if (
        base_config.is_encoder_decoder
        or type(base_config) not in AutoModelForCausalLM._model_mapping
    ):
        return False
    kind = AutoModelForCausalLM._model_mapping[type(base_config)]
    layers = getattr(base_config, "layer_types", None) or []
    return bool(
        # Set if the model passes keyword arguments to the attention function (transformers 5.23).
        kind._supports_attention_backend
        and kind._supports_sdpa
        and {*layers} <= ATTENTION_LAYERS
        and not getattr(base_config, "attn_logit_softcapping", None)
    )


def plain_attention(model: Any) -> str | None:
    """Return transformers' name of the attention that defines the model; None: it has one only."""
    if not getattr(model, "_supports_attention_backend", False):
        return None
    return "sdpa" if model._supports_sdpa else "eager"


def implementation(packed: bool, flash: bool, compiled: bool = False) -> str | None:
    """Return transformers' name of the run's attention function; registers the packed one.

    None: transformers selects SDPA if the model has it, else its own.
    """
    if flash:
        return "flash_attention_2"
    if packed:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # torch.compile would recompile it for each set of lengths.
        uncompiled: Any = torch.compiler.disable  # untyped
        attention = uncompiled(per_example) if compiled else per_example
        ALL_ATTENTION_FUNCTIONS.register(PER_EXAMPLE, attention)
    return PER_EXAMPLE if packed else None


@dataclass(frozen=True, eq=False)
class Row:
    """A row's segments; as a class, since torch.compile recompiles for new plain integers."""

    segments: Segments

    @cached_property
    def pieces(self) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
        """The lengths of the row's pieces; the numbers of each segment's shared and own pieces.

        The row is cut where a segment begins and where its shared prefix ends. With segments
        [(0, 5), (3, 4), (5, 2)]:

            row         P P P a a b b b b c c     shared   own
            pieces      0     1   2   3   4
            segment 1   P P P a a                          0 1
            segment 2   P P P     b b b b         0        2 3
            segment 3   P P P     b b     c c     0 2      4
        """
        spans: list[tuple[int, int]] = []  # in the row, of one segment's tokens
        segments, cuts, begin = [], {0}, 0
        for shared, own in self.segments:
            spans = [*_first(shared, spans), (begin, begin + own)]
            segments.append(spans)
            cuts.update(end for _, end in spans)
            begin += own
        ordered = sorted(cuts)
        number = {cut: n for n, cut in enumerate(ordered)}
        numbers = [[range(number[a], number[b]) for a, b in spans] for spans in segments]
        return [end - start for start, end in pairwise(ordered)], [
            ([n for span in before for n in span], [*own]) for *before, own in numbers
        ]


def _first(count: int, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans of the first `count` tokens."""
    kept = []
    for begin, end in spans:
        if count > 0:
            kept.append((begin, min(end, begin + count)))
        count -= end - begin
    return kept


def row_inputs(segments: Segments, flash: bool) -> dict[str, Any]:
    """Return a packed row's model inputs: `position_ids` [1, T] and the `row`.

    For FlashAttention-2, the `row` is replaced by the examples' boundaries, int32 [B + 1]
    (transformers 5.23, modeling_flash_attention_utils.py). Otherwise every layer would compute
    them. FlashAttention-2 does not share prefixes.
    """
    spans = [torch.arange(shared, shared + own) for shared, own in segments]
    positions = torch.cat(spans)[None]
    if not flash:
        return {"position_ids": positions, "row": Row(segments)}
    lengths = [own for _, own in segments]
    boundaries = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    ends = {f"cu_seq_lens_{side}": boundaries for side in "qk"}
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
    """Return attention's output [1, T, heads, d] for a packed row, computed segment by segment.

    query: [1, heads, T, d]; key and value: [1, key heads, T, d]. Each segment attends to its
    shared prefix and to itself. Without a `row`, this is transformers' attention for rows
    without padding. Raises UserError for a model that is not causal.
    """
    # Imported here: it is slow, and commands without a model do not need it.
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if row is None:
        mask = _mask(query, key.shape[2], sliding_window) if mask is None else mask
        unpacked: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return unpacked, None
    if not getattr(module, "is_causal", True):
        raise UserError(
            f"found {type(module).__name__}, in which tokens attend to later ones; expected a "
            "causal model. Set is_decoder in its config.json, or train another model."
        )
    dtype, on_cpu = query.dtype, query.device.type == "cpu"
    upcast = on_cpu and dtype == torch.bfloat16
    if upcast:
        query, key, value = query.float(), key.float(), value.float()
    outputs = []
    # Autocast would cast the fp32 tensors back to bf16.
    with torch.autocast("cpu", enabled=False) if upcast else nullcontext():
        for q, k, v, new in _segments(row, on_cpu, query, key, value):
            if upcast and q.shape[2] >= MIN_BF16_TOKENS:
                q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
            own_mask = _mask(q, k.shape[2], sliding_window)
            attend = sdpa_attention_forward if q.shape[2] == k.shape[2] else _attend_from_suffix
            output = attend(module, q, k, v, own_mask, **options)[0][:, -new:]
            outputs.append(output.float() if upcast else output)
    return torch.cat(outputs, 1).to(dtype), None


def _segments(
    row: Row, on_cpu: bool, *tensors: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Yield each segment's queries, keys and values, and how many of its last outputs are new.

    A row holds each shared prefix once. With segments [(0, 5), (3, 4), (0, 2)]:

        row                 P P P a a b b b b c c
        segment 1  queries  P P P a a                 5 new outputs
                   keys     P P P a a
        segment 2  queries            b b b b         4 new outputs
                   keys     P P P     b b b b
        segment 3  queries                    c c     2 new outputs
                   keys                       c c

    Invariant: the new outputs, concatenated, are one output per token of the row, in order. On a
    GPU, and where `_skips_prefix_queries` is false, segment 2 has the queries P, too. Their outputs
    are not new.
    """
    lengths, numbers = row.pieces
    queries, keys, values = (torch.split(x, lengths, 2) for x in tensors)
    # Each piece is a view of the row. If the backward pass keeps one view, the complete row stays
    # in memory. Shared prefixes require copies of some pieces, so all pieces are copied then.
    sharing = any(shared for shared, _ in row.segments)
    for (shared, own), (before, after) in zip(row.segments, numbers, strict=True):
        if not sharing:
            (n,) = after
            yield queries[n], keys[n], values[n], own
            continue
        k, v = (torch.cat([x[n] for n in before + after], 2) for x in (keys, values))
        skips = shared > 0 and on_cpu and _skips_prefix_queries(shared, own)
        yield torch.cat([queries[n] for n in (after if skips else before + after)], 2), k, v, own


def _skips_prefix_queries(shared: int, length: int) -> bool:
    """Return whether it is faster to skip the prefix queries and use a mask."""
    long_prefix = shared >= length
    longest = MAX_MASKED_TOKENS_LONG_PREFIX if long_prefix else MAX_MASKED_TOKENS
    return shared + length <= longest


def _attend_from_suffix(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention's output [1, t, heads, d] for an example's last t queries and all its keys.

    With a mask, transformers 5.23 (integrations/sdpa_attention.py) would first repeat keys and
    values for each head. The CPU kernel does not need that.
    """
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, mask, dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2), None


def _mask(query: Tensor, length: int, window: int | None) -> Tensor | None:
    """Return the mask [t, length] of an example's last t queries; None: causal attention."""
    if window is not None and length > window:
        positions = torch.arange(length, device=query.device)
        distance = positions[-query.shape[2] :, None] - positions
        return (distance >= 0) & (distance < window)
    if query.shape[2] == length:
        return None
    return _causal(-(-length // 256) * 256, query.dtype)[length - query.shape[2] : length, :length]


@lru_cache(4)
def _causal(size: int, dtype: torch.dtype) -> Tensor:
    """Return a causal mask [size, size] to add to scores; all layers share it.

    With a boolean mask, PyTorch's kernel would create such a tensor in each call, and keep it for
    the backward pass.
    """
    with torch.inference_mode(False):  # An inference tensor cannot be used in a backward pass.
        return torch.full((size, size), -math.inf, dtype=dtype).triu(1)
