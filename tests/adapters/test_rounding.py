"""Rounding with a layer's inputs changes its outputs less than rounding to nearest."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop.adapters import merge, rounding
from loop.adapters.adapter import load_base, read_adapter, with_adapter
from loop.adapters.base_tensors import skeleton_of
from loop.adapters.compare_logits import examples_after, examples_of
from loop.adapters.merge_rules import read_changes
from loop.adapters.rounding import changed_layers, inputs_of, rounded
from tests.support.helpers import write_dialogues


@pytest.fixture(scope="module")
def weight_and_inputs() -> tuple[Tensor, Tensor]:
    """Return a matrix [96, 160] and inputs [2000, 160] of nearly rank 20, like hidden states."""
    torch.manual_seed(0)
    inputs = torch.randn(2000, 20) @ torch.randn(20, 160) + 0.1 * torch.randn(2000, 160)
    return 0.02 * torch.randn(96, 160), inputs * torch.rand(160)


def output_error(weight: Tensor, exact: Tensor, inputs: Tensor) -> float:
    return float(((weight.float() - exact) @ inputs.T).norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_for_other_inputs_differ_by_less_than_half(
    weight_and_inputs: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    weight, inputs = weight_and_inputs
    result = rounded(weight, inputs[:1000], dtype)
    assert result.dtype == dtype
    nearest, other = weight.to(dtype), inputs[1000:]
    assert output_error(result, weight, other) < output_error(nearest, weight, other) / 2
    # Each value is still near the exact one.
    step = (nearest.float() - weight).abs().max()
    assert (result.float() - weight).abs().max() < 6 * step


def test_16_bit_values_are_not_changed_and_rows_are_independent(
    weight_and_inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, inputs = weight_and_inputs
    exact = weight.bfloat16().float()
    assert torch.equal(rounded(exact, inputs, torch.bfloat16).float(), exact)
    at_once = rounded(weight, inputs, torch.bfloat16)
    monkeypatch.setattr(rounding, "ROWS_AT_ONCE", 32)
    parts = rounded(weight, inputs, torch.bfloat16)
    # A matrix product of fewer rows may differ in the last bit. This changes a few roundings.
    assert (at_once != parts).float().mean() < 1e-3


def test_a_layer_whose_inputs_are_zero_is_rounded_to_nearest() -> None:
    weight = torch.randn(4, 8)
    found = rounded(weight, torch.zeros(10, 8), torch.bfloat16)
    assert torch.equal(found, weight.bfloat16())


def adapter_of(base: Path, folder: Path, targets: str | list[str], *saved: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=8, target_modules=targets, modules_to_save=[*saved])
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "modules_to_save" in name:
            parameter.data += 0.01 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_layers_share_the_kept_inputs_which_stay_within_the_given_bytes(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(adapter_of(tiny_model, tmp_path / "adapter", "all-linear", "lm_head"))
    changes = read_changes(adapter.folder, skeleton_of(adapter))
    layers = changed_layers(skeleton_of(adapter), changes)
    assert len(layers) == 2 * 7 + 1
    model = with_adapter(load_base(adapter, adapter.base, torch.float32), adapter)
    texts = examples_after(adapter, examples_of(adapter, {}, 4), 6)
    assert len(texts) == 6
    found = inputs_of(model, layers, texts, 1e9)
    assert found.keys() == {*layers}
    layer = "model.layers.1."
    query, key, gate, down = (
        found[f"{layer}{name}"]
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")
    )
    lengths = [min(len(text.input_ids), 128) for text in texts]
    assert [part.shape for part in down] == [(length, 128) for length in lengths]
    assert all(one is other for one, other in zip(query, key, strict=True))
    assert all(one is not other for one, other in zip(query, gate, strict=True))
    # Each layer has 3 inputs of width 64 and one of 128; the LM head has one of 64. An element has
    # 2 bytes.
    most = 2 * (2 * (3 * 64 + 128) + 64) * sum(lengths) // 3
    few = inputs_of(model, layers, texts, most)
    down = few["model.layers.1.mlp.down_proj"]
    assert len(down) == 6  # Every text is kept, but only some of its tokens.
    assert sum(len(part) for part in down) <= sum(lengths) / 3
    step = -(-len(found["lm_head"][0]) // len(few["lm_head"][0]))
    assert torch.equal(few["lm_head"][0], found["lm_head"][0][::step])


def test_a_text_that_reaches_no_layer_adds_no_inputs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = read_adapter(adapter_of(tiny_model, tmp_path / "adapter", ["q_proj"]))
    model = with_adapter(load_base(adapter, adapter.base, torch.float32), adapter)
    texts = examples_after(adapter, [], 2)
    layer = "model.layers.0.self_attn.q_proj"
    run, reached = rounding.run, iter([False, True])
    monkeypatch.setattr(rounding, "run", lambda *given: next(reached) and run(*given))
    assert len(inputs_of(model, [layer], texts, 1e9)[layer]) == 1


@pytest.mark.parametrize("saved", [["mlp"], ["lm_head"]])
def test_completely_trained_modules_are_rounded_and_verified_against_their_fp32_values(
    saved: list[str], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    adapter = adapter_of(base, tmp_path / "adapter", ["q_proj"], *saved)
    means = []
    for texts in ("0", "32"):
        words = ["--adapter", str(adapter), "--output_dir", str(tmp_path / texts)]
        merge.main([*words, "--rounding_texts", texts])
        output = capsys.readouterr().out
        assert ("rounding: by the inputs of 32 texts" in output) == (texts == "32")
        assert ("--rounding_texts 64 makes it smaller" in output) == (texts == "0")
        means.append(float(output.split("root mean square ")[1].split(";")[0]))
    # If the reference's head were rounded to nearest, rounding to nearest would seem to be better.
    assert means[1] < means[0]


def test_texts_for_rounding_are_not_those_for_verification_unless_there_are_no_others(
    tiny_model: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(adapter_of(tiny_model, tmp_path / "adapter", ["q_proj"]))
    adapter.trained["data_path"] = [str(tmp_path / "gone.json")]
    known = examples_of(adapter, {}, 4)
    texts = examples_after(adapter, known, 64)
    assert len({text.id for text in texts}) == 64
    assert not {text.id for text in known} & {text.id for text in texts}
    two = write_dialogues(tmp_path / "two.json", ["Hi", "Hello there."], ["And?", "So."])
    adapter.trained["data_path"] = [str(two)]
    known = examples_of(adapter, {}, 4)
    assert len(known) == 2
    texts = examples_after(adapter, known, 64)
    assert texts[:2] == known
    assert len(texts) == 64


@pytest.mark.slow
def test_rounding_the_bundled_model_with_inputs_differs_far_less_than_to_nearest(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of(chat_model, tmp_path / "adapter", ["q_proj", "v_proj", "down_proj"])
    means = []
    for texts in ("0", "32"):
        target = tmp_path / f"merged-{texts}"
        words = ["--adapter", str(adapter), "--rounding_texts", texts]
        merge.main([*words, "--output_dir", str(target)])
        output = capsys.readouterr().out
        means.append(float(output.split("root mean square ")[1].split(";")[0]))
    print(f"root mean square difference: to nearest {means[0]}, with inputs {means[1]}")
    assert means[1] < 0.6 * means[0]
