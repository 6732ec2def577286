"""A tiny model with a real tokenizer, and the folder beside the project that may be absent."""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a missing model must not ask the hub for 25 s
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks cannot share a GPU
os.environ["DS_ACCELERATOR"] = "cpu"

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real dialogues, tokenizers and golden files; not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with the golden files is not here")
    return SHARED


@pytest.fixture(scope="session")
def chat_model() -> Path:
    """The embedded model: real weights, real tokenizer, real chat template."""
    from loop.embedded import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def chat_tokenizer(chat_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture(scope="session")
def tiny_model(chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the embedded model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(chat_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=chat_tokenizer.eos_token_id,
        pad_token_id=chat_tokenizer.pad_token_id,
        bos_token_id=chat_tokenizer.bos_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def broken_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one weight that is not a number."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "broken"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
