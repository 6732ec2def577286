"""A merge's memory: one file's tensors while it writes, one model while it verifies."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.support.helpers import ROOT, SLOWNESS

SHARD = 50_000_000
MERGE = """
import sys
from pathlib import Path
from loop.adapters import merge
small, flags = sys.argv[1:7], sys.argv[7:]
own = Path("/proc/self")
def read(name):
    lines = (own / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024
merge.main(small)
before = read("VmRSS")
(own / "clear_refs").write_text("5")  # Reset the peak, proc(5).
merge.main(flags)
print("peak", read("VmHWM") - before)
"""


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


def peak(small: Path, adapter: Path, *flags: str, shard: float = SHARD) -> int:
    """Return the peak of the bytes that a merge adds in memory, mapped files included.

    The same process merges the small adapter first. This excludes the libraries' memory, which
    differs by up to 50 MB between processes.
    """

    def words(adapter: Path) -> list[str]:
        target = adapter.parent / "-".join(["merged", *flags])
        found = ["--adapter", str(adapter), "--base", str(adapter.parent / "base")]
        return [*found, "--output_dir", str(target)]

    large = [*words(adapter), "--shard_gb", str(shard / 1e9), *flags]
    done = subprocess.run(
        [sys.executable, "-c", MERGE, *words(small), *large],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300 * SLOWNESS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1])


@pytest.mark.slow
def test_writing_takes_the_memory_of_a_file_and_verifying_that_of_the_base(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    small = make(tmp_path / "small", tokenizer, 64, 1)
    large = make(tmp_path / "large", tokenizer, 1024, 8)
    base = (tmp_path / "large" / "base" / "model.safetensors").stat().st_size
    assert base > 6 * SHARD
    written = peak(small, large, "--prompts", "0")
    verified = peak(small, large)
    print(f"base {base / 1e6:.0f} MB: write {written / 1e6:.0f}, verify {verified / 1e6:.0f} MB")
    # A file's tensors, and the mapped pages that they are read from.
    assert written < 3 * SHARD
    assert SHARD < verified < base + SHARD


@pytest.mark.slow
def test_rounding_with_inputs_takes_the_memory_of_the_base_and_a_file(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    small = make(tmp_path / "small", tokenizer, 64, 1, torch.bfloat16)
    large = make(tmp_path / "large", tokenizer, 1024, 16, torch.bfloat16)
    base = (tmp_path / "large" / "base" / "model.safetensors").stat().st_size
    shard = 3 * SHARD  # A layer in fp32 takes 42 MB of it, layers' inputs a quarter.
    rounded = peak(small, large, "--rounding_texts", "64", shard=shard)
    print(f"base {base / 1e6:.0f} MB in 16 bits: rounded and verified {rounded / 1e6:.0f} MB")
    assert SHARD < rounded < base + shard
