"""A merged model has the same logits as the base model with the adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from data.encoding.tokenizer import CHARACTERS
from loop.adapters import merge
from loop.model.new_tokens import grow
from loop.model.quantization import four_bit
from tests.conftest import small_tokenizer, trainer
from tests.support.helpers import prompt_of, write_dialogues
from tests.support.matrix import logits_of
from tests.support.small_t5 import TOKENS, make_t5

CODE = 'Say:\n\tx = {"a": `b`} if c < d ^ e else \\f and so on.'
BOTH = ("decoder", "T5")


def trained(kind: str, model: Path, folder: Path, *flags: str) -> Path:
    """Train an adapter on dialogues with code; return its folder."""
    data = write_dialogues(folder / "code.json", ["Show me.", CODE], ["And?", f"Well. {CODE}"])
    return trainer(model, folder)(kind, "--data_path", data, "--lora_dropout", "0", *flags)


def merged(adapter: Path, *flags: str | Path) -> Path:
    target = adapter.parent / f"{adapter.name}-merged"
    merge.main(["--adapter", str(adapter), *map(str, flags)])
    return target


def answers(model: Path) -> Tensor:
    """Return the logits of a model loaded by transformers alone, computed in fp32."""
    pairs = AutoConfig.from_pretrained(model).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    loaded = loader.from_pretrained(model).float().eval()
    with torch.no_grad():
        logits: Tensor = loaded(**prompt_of(loaded.config)).logits
    return logits


def in_bf16(model: Path, folder: Path) -> Path:
    """Write the model in bf16, the usual dtype of stored models."""
    pairs = AutoConfig.from_pretrained(model).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    loader.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def without_quantisation(model: Path, folder: Path) -> Path:
    """Write the model's 4-bit weights, dequantised by transformers."""
    pairs = AutoConfig.from_pretrained(model).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    settings = {"quantization_config": four_bit(torch.bfloat16), "dtype": torch.bfloat16}
    loader.from_pretrained(model, **settings).dequantize().save_pretrained(folder)
    return folder


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Path:
    name = "tiny_model" if request.param == "decoder" else "tiny_t5"
    path: Path = request.getfixturevalue(name)
    return path


@pytest.mark.parametrize("quantised", [False, True], ids=["LoRA", "QLoRA"])
@pytest.mark.parametrize(
    "precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("model", BOTH, indirect=True)
def test_the_merged_model_has_the_logits_of_base_and_adapter(
    model: Path, precision: str, quantised: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if precision == "bf16":
        model = in_bf16(model, tmp_path / "base")
    flags = ["--q_lora", str(quantised), "--mixed_precision", precision]
    adapter = trained("run", model, tmp_path, *flags)
    # A merge into fp32 rounds nothing. A merge into bf16 rounds weights with the layers' inputs.
    folder = merged(adapter, "--rounding_texts", "64" if precision == "bf16" else "0")
    output = capsys.readouterr().out
    assert "Largest difference of logits" in output
    assert "rounded to nearest" not in output
    assert ("base weights: dequantised" in output) == quantised
    if quantised and precision == "bf16":  # the base is quantised from bf16 and computes in bf16
        model = without_quantisation(model, tmp_path / "dequantised")
    base, expected = logits_of(model, adapter, quantised and precision == "no")
    found = answers(folder)
    tolerance = 1e-4 if precision == "no" else 2e-2
    assert float(output.split(" texts: ")[1].split(",")[0]) < tolerance
    assert (found - expected).abs().max() < tolerance
    assert (base - expected).abs().max() > 10 * tolerance
    assert not (folder / "adapter_config.json").exists()
    text = "Ask {me}\n\tfor `code`"
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (folder, adapter)]
    ids, same = (tokenizer(text).input_ids for tokenizer in tokenizers)
    assert ids == same
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {
        torch.float32 if precision == "no" else torch.bfloat16
    }


def test_a_merge_into_16_bits_rounds_to_nearest_and_prints_the_remedy(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = in_bf16(tiny_model, tmp_path / "base")
    adapter = trained("run", model, tmp_path, "--mixed_precision", "bf16")
    merged(adapter)
    output = capsys.readouterr().out
    assert "Changed weights were rounded to nearest" in output
    assert "--rounding_texts 64" in output


@pytest.mark.parametrize("model", BOTH, indirect=True)
def test_a_qlora_adapter_can_also_be_merged_into_the_original_weights(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained("run", model, tmp_path, "--q_lora", "True")
    folder = merged(adapter, "--base_weights", "original", "--shard_gb", "0.0001")
    _, expected = logits_of(model, adapter, four_bit=False)
    assert (answers(folder) - expected).abs().max() < 1e-4
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {*index["weight_map"].values()}
    assert len(files) > 3
    assert files == {file.name for file in folder.glob("*.safetensors")}
    output = capsys.readouterr().out
    assert "base weights: original, without the 4-bit rounding" in output
    assert "Largest difference from the adapter on its 4-bit base: " in output


def test_an_adapter_of_a_stored_4_bit_base_is_merged_into_plain_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    settings = {"quantization_config": four_bit(torch.float32)}
    AutoModelForCausalLM.from_pretrained(tiny_model, **settings).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    adapter = trained("run", base, tmp_path, "--q_lora", "True", "--mixed_precision", "no")
    folder = merged(adapter)
    _, expected = logits_of(base, adapter, four_bit=False)
    assert (answers(folder) - expected).abs().max() < 1e-4
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", ["tied", "too few rows", "bart"])
def test_new_rows_are_merged_into_tied_short_and_biased_matrices(
    kind: str, tiny_t5: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    flags = ()
    if kind == "bart":
        flags = ("--model_max_length", "1024")
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, "eos_token_id": 1}
        sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 64}
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, vocab_size=TOKENS, decoder_start_token_id=0, forced_eos_token_id=None, **sizes
        )
        AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    else:
        rows = TOKENS + 32 if kind == "tied" else TOKENS
        make_t5(tmp_path / "base", tokenizer, tied=kind == "tied", rows=rows)
    adapter = trained("run", tmp_path / "base", tmp_path, *flags)
    folder = merged(adapter)
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    grow(base, TOKENS + len(CHARACTERS))
    with torch.no_grad():
        inputs = prompt_of(base.config)
        expected = PeftModel.from_pretrained(base, str(adapter)).eval()(**inputs).logits
    found = answers(folder)
    assert (found - expected).abs().max() < 1e-4
    assert found.shape == expected.shape
    assert len(load_file(folder / "model.safetensors")) == len(
        load_file(tmp_path / "base" / "model.safetensors")
    )


def write_adapter(model: Any, folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """Write an adapter with random weights, like a trainer that uses only peft."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            size = parameter.detach().abs().mean() if "magnitude" in name else 0.0
            parameter.data.copy_(size + 0.2 * torch.rand_like(parameter))
    adapted.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    return folder


ROWS = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 3]}}
SETTINGS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.*": 2}, "alpha_pattern": {"v_proj": 9, "q_proj": 1}},
    "biases": {"bias": "all"},
    "biases of the targets": {"bias": "lora_only"},
    "the embedding": {"target_modules": ["embed_tokens", "o_proj"]},
    "a complete LM head": {"modules_to_save": ["lm_head"]},
    "all linear layers": {"target_modules": "all-linear"},
    "rows of tokens": ROWS,
    "layers by a pattern": {"target_modules": r".*\.1\..*\.(gate|down)_proj"},
}


@pytest.mark.parametrize("case", [*SETTINGS])
def test_every_supported_peft_setting_is_merged_exactly(
    case: str, biased_model: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(biased_model)
    tokenizer = AutoTokenizer.from_pretrained(biased_model)
    adapter = write_adapter(base, tmp_path / "adapter", tokenizer, **SETTINGS[case])
    _, expected = logits_of(biased_model, adapter, four_bit=False)
    assert (answers(biased_model) - expected).abs().max() > 1e-2
    folder = merged(adapter, "--base", biased_model)
    assert (answers(folder) - expected).abs().max() < 1e-4


def test_transposed_weights_are_merged_exactly(chat_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer, base = small_tokenizer(chat_tokenizer), tmp_path / "base"
    sizes = {"vocab_size": len(tokenizer), "n_embd": 64, "n_layer": 1, "n_head": 4}
    config = GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    gpt2 = GPT2LMHeadModel.from_pretrained(base)
    targets = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    adapter = write_adapter(gpt2, tmp_path / "adapter", tokenizer, **targets)
    _, expected = logits_of(base, adapter, four_bit=False)
    assert (answers(merged(adapter, "--base", base)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("model", BOTH, indirect=True)
def test_transformers_alone_gives_an_adapter_the_logits_of_peft(
    model: Path, tmp_path: Path
) -> None:
    adapter = trained("run", model, tmp_path)
    _, expected = logits_of(model, adapter, four_bit=False)
    pairs = AutoConfig.from_pretrained(model).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    loaded = loader.from_pretrained(model)
    loaded.load_adapter(str(adapter))
    with torch.no_grad():
        found = loaded.eval()(**prompt_of(loaded.config)).logits
    assert (found - expected).abs().max() < 1e-5
