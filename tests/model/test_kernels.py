"""liger-kernel's layers have the results of transformers' layers, checked on a CPU.

Triton's interpreter runs the kernels without a GPU. pip installs both packages (300 MB) into a
separate folder, so that other tests run without them.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from loop.model import kernels
from tests.support.helpers import command

KEPT = Path.home() / ".cache/lora-loop/liger"
PACKAGES = ("liger-kernel==0.8.5", "triton==3.9.0")


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return the folder with both packages."""
    if not (KEPT / "made").exists():
        shutil.rmtree(KEPT, ignore_errors=True)
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", KEPT)
        done = command(*pip, *PACKAGES)
        assert done.returncode == 0, done.stderr
        (KEPT / "made").touch()
    return KEPT


def compared(folder: Path, kind: str, activation: str) -> dict[str, Any]:
    done = command(
        *(sys.executable, "tests/support/kernels_on_cpu.py", kind, activation),
        TRITON_INTERPRET="1",
        PYTHONPATH=str(folder),
        LORA_LOOP_WARM="",
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(kernels.LIGER_MODELS))
def test_fused_layers_have_the_losses_and_gradients_of_transformers_own(
    kind: str, folder: Path
) -> None:
    found = compared(folder, kind, "silu")
    assert found["note"] == "liger-kernel 0.8.5: norms, rotary embedding, activation"
    assert all(name.startswith("liger_kernel.") for name in found["run"])
    assert found["loss"] < 1e-6
    assert found["gradients"] < 1e-5
    assert found["trained"] == 2 * 2 * 4


@pytest.mark.slow
def test_an_activation_other_than_silu_is_not_patched(folder: Path) -> None:
    found = compared(folder, "llama", "gelu")
    assert found["note"] == "liger-kernel 0.8.5: norms, rotary embedding"
    assert found["run"][0] == "transformers.models.llama.modeling_llama"
    assert found["loss"] < 1e-6
    assert found["gradients"] < 1e-5


class Foreign(LlamaForCausalLM):
    """A model whose code is not from transformers."""


def test_other_models_and_broken_installations_are_not_patched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 9, "num_hidden_layers": 1}
    with torch.device("meta"):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        shape = LlamaConfig(**sizes, **heads)
        llama, foreign = LlamaForCausalLM(shape), Foreign(shape)
        t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, num_layers=1))
    monkeypatch.setattr(kernels, "version", lambda package: None)
    assert kernels.use_kernels(llama) == ""
    monkeypatch.setattr(kernels, "version", lambda package: "0.8.5")
    assert kernels.use_kernels(t5) == "liger-kernel 0.8.5: not used for this t5 model"
    assert kernels.use_kernels(foreign) == "liger-kernel 0.8.5: not used for this llama model"
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # The import fails.
    summary = kernels.use_kernels(llama)
    assert summary.startswith("liger-kernel 0.8.5: not used, since it cannot be loaded: ")
    del llama.model.layers[0].mlp.gate_proj
    assert kernels.use_kernels(llama) == "liger-kernel 0.8.5: not used for this llama model"
