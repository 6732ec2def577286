"""A GGUF file contains the same model, with the settings that llama.cpp writes."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from data.errors import UserError
from loop.adapters import merge
from loop.adapters.gguf import check, write_gguf
from loop.model.bundled_model import GGUF, WHEEL
from tests.support.helpers import prompt_of


def values(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_read_back_gives_the_same_logits_and_ids(
    dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model", tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="model.gguf",
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    with torch.no_grad():
        inputs = prompt_of(model.config)
        found, expected = read(**inputs).logits, model.float()(**inputs).logits
    assert torch.allclose(found, expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(tiny_model)(text).input_ids


def test_the_bundled_models_gguf_file_has_the_settings_of_llama_cpps_own(
    chat_model: Path, tmp_path: Path
) -> None:
    """The wheel's file was written by llama.cpp's converter and then quantised."""
    write_gguf(chat_model, tmp_path / "model.gguf")
    files = importlib.metadata.distribution(WHEEL).files or []
    (original,) = (Path(str(f.locate())) for f in files if f.name == GGUF)
    ours, theirs = values(tmp_path / "model.gguf"), values(original)
    # Name and quantisation settings are not compared. transformers reads the tokenizer as GPT-2's,
    # which splits digits differently. Adapters are trained with that tokenizer.
    theirs = {k: v for k, v in theirs.items() if not k.startswith(("general.", "GGUF."))}
    assert theirs.pop("tokenizer.ggml.pre") == "smollm"
    assert ours["tokenizer.ggml.pre"] == "gpt-2"
    assert {*theirs} <= {*ours}
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    shapes = [
        {t.name: t.shape.tolist() for t in GGUFReader(file).tensors}
        for file in (tmp_path / "model.gguf", original)
    ]
    assert shapes[0] == shapes[1]


def test_merge_writes_a_gguf_file_and_refuses_models_other_than_llama(
    train: Any, tiny_t5: Path, tmp_path: Path
) -> None:
    adapter = train("run", "--lora_dropout", "0")
    file = tmp_path / "run.gguf"
    merge.main(["--adapter", str(adapter), "--gguf", str(file)])
    assert len(GGUFReader(file).tensors) == 2 * 9 + 3
    from transformers import AutoConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    with pytest.raises(UserError, match=r"found a t5 model; expected llama\. .*convert_hf_to_gguf"):
        check(AutoConfig.from_pretrained(tiny_t5), tokenizer)
    llama = AutoConfig.from_pretrained(adapter.parent / "run-merged")
    with pytest.raises(UserError, match="found an unsupported tokenizer"):
        check(llama, tokenizer)
    llama.rope_parameters = {"rope_type": "llama3"}
    with pytest.raises(UserError, match="found rope_type llama3; expected default"):
        check(llama, tokenizer)
