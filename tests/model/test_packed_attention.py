"""Packed attention in bf16 on a CPU computes short examples in fp32."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from loop.model.packed_attention import MIN_BF16_TOKENS, Row, per_example

SHORT, LONG = 30, MIN_BF16_TOKENS


class Layer:
    """The attributes that transformers' attention reads from a layer."""

    is_causal = True
    num_key_value_groups = 3


@pytest.mark.parametrize("autocast", [False, True])
def test_short_examples_are_computed_in_fp32_with_and_without_autocast(autocast: bool) -> None:
    torch.manual_seed(0)
    row = [torch.randn(1, heads, SHORT + LONG, 16).bfloat16() for heads in (6, 2, 2)]
    for part in row:
        part.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = per_example(Layer(), row[0], row[1], row[2], None, Row([(0, SHORT), (0, LONG)]))
    assert found.dtype == torch.bfloat16
    short, long = found.split([SHORT, LONG], 1)
    for part, place, dtype in (
        (short, slice(0, SHORT), torch.float32),
        (long, slice(SHORT, None), torch.bfloat16),
    ):
        q, k, v = (x[:, :, place].detach().to(dtype) for x in row)
        expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        assert torch.equal(part, expected.transpose(1, 2).bfloat16())
    found.float().sum().backward()
    assert {part.grad.dtype for part in row if part.grad is not None} == {torch.bfloat16}
