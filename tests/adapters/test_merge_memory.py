"""A merge takes the memory of one file while it writes, and of one model while it verifies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loop.adapters import merge
from tests.support.helpers import allocated

SHARD = 50_000_000


def make(
    folder: Path, tokenizer: Any, hidden: int, layers: int, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a random Llama in one file, and an adapter for it; return the adapter's folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def peak(adapter: Path, *flags: str, shard: float = SHARD) -> int:
    """Return the peak of the bytes that a merge's tensors take, without mapped files."""
    target = adapter.parent / "-".join(["merged", *flags])
    words = ["--adapter", str(adapter), "--base", str(adapter.parent / "base")]
    words += ["--output_dir", str(target), "--shard_gb", str(shard / 1e9), *flags]
    with allocated(mapped=adapter.parent) as held:
        merge.main(words)
    return held.most


@pytest.mark.slow
def test_writing_takes_the_memory_of_a_file_and_verifying_that_of_the_base(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    large = make(tmp_path / "large", tokenizer, 1024, 8)
    base = (tmp_path / "large" / "base" / "model.safetensors").stat().st_size
    assert base > 6 * SHARD
    written = peak(large, "--prompts", "0")
    proven = peak(large)
    print(f"base {base / 1e6:.0f} MB: written {written / 1e6:.0f}, proven {proven / 1e6:.0f} MB")
    # Less than the tensors of one file, because the base is mapped, even while logits are compared.
    assert 0 < written < SHARD
    assert 0 < proven < SHARD


@pytest.mark.slow
def test_rounding_with_inputs_takes_the_memory_of_the_base_and_a_file(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    large = make(tmp_path / "large", tokenizer, 1024, 16, torch.bfloat16)
    base = (tmp_path / "large" / "base" / "model.safetensors").stat().st_size
    shard = 3 * SHARD  # a layer in fp32 takes 42 MB, the layers' inputs a quarter of the shard
    found = peak(large, "--rounding_texts", "64", shard=shard)
    print(f"base {base / 1e6:.0f} MB in 16 bits: rounded and proven {found / 1e6:.0f} MB")
    assert 0 < found < base + shard
