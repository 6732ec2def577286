"""LoRA and new tokens with the real shapes of Flan-T5, small to XXL."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config

from loop.model.lora_targets import target_names
from loop.model.new_tokens import grow, places

# config.json of google/flan-t5-*: d_model, d_kv, d_ff, layers of each side, heads.
SHAPES = {
    "small": (512, 64, 1024, 8, 6),
    "base": (768, 64, 2048, 12, 12),
    "large": (1024, 64, 2816, 24, 16),
    "xl": (2048, 64, 5120, 24, 32),
    "xxl": (4096, 64, 10240, 24, 64),
}
# Each q and v has 8 x (d_model + heads x d_kv) LoRA weights with r = 8. Three attentions per layer.
TRAINABLE = {
    "small": 344_064,
    "base": 884_736,
    "large": 2_359_296,
    "xl": 4_718_592,
    "xxl": 9_437_184,
}


def flan_t5(size: str) -> Any:
    d_model, d_kv, d_ff, layers, heads = SHAPES[size]
    config = T5Config(
        vocab_size=32128,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
        model.lm_head.weight = torch.nn.Parameter(torch.empty(32128, d_model))
    return model


@pytest.mark.parametrize("size", [*SHAPES])
def test_lora_adapts_q_and_v_of_encoder_decoder_and_cross_attention(size: str) -> None:
    model, layers = flan_t5(size), SHAPES[size][3]
    targets = target_names(model, None)
    assert targets == ("q", "v")
    with torch.device("meta"):
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=[*targets]))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    prefix = "base_model.model."
    expected = {
        f"{prefix}{side}.block.{layer}.layer.{place}.{attention}.{target}.lora_{x}.default.weight"
        for side, place, attention in [
            ("encoder", 0, "SelfAttention"),
            ("decoder", 0, "SelfAttention"),
            ("decoder", 1, "EncDecAttention"),
        ]
        for layer in range(layers)
        for target in "qv"
        for x in "AB"
    }
    assert {*trained} == expected
    assert sum(parameter.numel() for parameter in trained.values()) == TRAINABLE[size]


@pytest.mark.parametrize("size", ["small", "xxl"])
def test_flan_t5_has_enough_rows_for_the_new_tokens(size: str) -> None:
    model, new = flan_t5(size), [*range(32100, 32108)]
    grow(model, 32108)
    assert model.shared.weight.shape == model.lm_head.weight.shape == (32128, SHAPES[size][0])
    assert places(model, new) == {
        "encoder.embed_tokens": new,
        "decoder.embed_tokens": new,
        "lm_head": new[::-1],
    }


def test_a_llamas_targets_are_its_query_and_value(tiny_model: Any) -> None:
    llama = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert target_names(llama, None) == ("q_proj", "v_proj")
    assert target_names(llama, ("all-linear",)) == ("all-linear",)
