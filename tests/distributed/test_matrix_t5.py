"""A T5 trains, stops and resumes under every backend; fewer combinations than for decoders."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.kill_sweep import dialogues, sweep
from tests.support.helpers import adapter_of, write_dialogues
from tests.support.matrix import (
    TOLERANCE,
    Train,
    held,
    log_in,
    logits_of,
    share_all_file,
    trainings,
)
from tests.support.small_t5 import TOKENS, joined_shards, make_t5

QUICK = [("LoRA", "zero3"), ("QLoRA", "zero2")]
KINDS = [
    pytest.param(kind, backend, marks=[] if (kind, backend) in QUICK else pytest.mark.slow)
    for kind in ("LoRA", "QLoRA")
    for backend in ("ddp", "zero2", "zero3")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten dialogues of very different lengths, with characters that T5's tokenizer lacks."""
    texts = [
        ["What is " + "very " * (3 * n) + "long?", "No {idea}.\n" + "I am happy. " * (n + 1)]
        for n in range(10)
    ]
    return write_dialogues(tmp_path_factory.mktemp("data") / "dialogues.json", *texts)


@pytest.fixture(scope="module")
def outputs(tiny_t5: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    # With gradients as small as 2e-5, AdamW amplifies rounding to 1e-3 of the learning rate.
    flags = ["--save_non_lora_state", "all", "--learning_rate", "3e-3"]
    runs = tmp_path_factory.mktemp("runs")
    return trainings(runs, tiny_t5, data, dict.fromkeys(TOLERANCE, flags))


@pytest.mark.parametrize(("kind", "backend"), KINDS)
def test_a_t5_has_the_losses_and_the_adapter_of_one_process(
    kind: str, backend: str, outputs: Train, tiny_t5: Path
) -> None:
    alone, output = outputs(kind, "one"), outputs(kind, backend)
    for mine, theirs in zip(log_in(output), log_in(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE[kind])
    expected, adapter = adapter_of(alone), adapter_of(output)
    assert {*adapter} == {*expected}
    assert sum("trainable_tokens" in name for name in adapter) == 3
    for key, tensor in expected.items():
        assert torch.allclose(adapter[key], tensor, atol=TOLERANCE[kind], rtol=0), key
    trained = load_file(output / "logits.safetensors")["logits"]
    base, loaded = logits_of(tiny_t5, output, four_bit=kind == "QLoRA")
    assert torch.allclose(loaded, trained, atol=1e-4, rtol=0)
    assert (base - trained).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "backend"), KINDS)
def test_the_saved_base_model_is_complete_and_its_old_rows_are_unchanged(
    kind: str, backend: str, outputs: Train, tiny_t5: Path
) -> None:
    before = load_file(tiny_t5 / "model.safetensors")
    state = load_file(outputs(kind, backend) / "non_lora_state.safetensors")
    alone = load_file(outputs(kind, "one") / "non_lora_state.safetensors")
    assert {*state} == {*alone}
    for matrix in ("shared.weight", "lm_head.weight"):
        assert torch.equal(state[matrix][:TOKENS], before[matrix][:TOKENS])
    four_bit = [name for name in state if name.endswith("absmax")]
    assert bool(four_bit) == (kind == "QLoRA")
    # T5's wo is never held in 4 bits.
    assert not [name for name in four_bit if ".wo." in name]
    for name, tensor in state.items():
        assert tensor.shape == alone[name].shape
        if kind == "LoRA":
            assert torch.allclose(tensor, alone[name], atol=1e-5), name


@pytest.mark.parametrize(
    "backend", ["zero3", *(pytest.param(b, marks=pytest.mark.slow) for b in ("ddp", "zero2"))]
)
def test_the_shards_hold_the_same_base_model_and_trainable_holds_the_adapters_rows(
    backend: str, outputs: Train, tiny_t5: Path, tmp_path: Path
) -> None:
    output = outputs("LoRA", backend)
    state = load_file(output / "non_lora_state.safetensors")
    joined = joined_shards(output / "shards", tiny_t5, tmp_path / "alone")
    assert {*state} < {*joined}  # The shards also have the embedding's other names.
    assert all(torch.equal(joined[name], state[name]) for name in state)
    trainable = load_file(output / "trainable" / "non_lora_state.safetensors")
    expected = {n: rows for n, rows in adapter_of(output).items() if "trainable_tokens" in n}
    assert len(expected) == 3
    assert {*trainable} == {*expected}
    assert all(torch.equal(trainable[name], rows) for name, rows in expected.items())


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        ("LoRA", "one", "zero3"),
        pytest.param("LoRA", "zero3", "ddp", marks=pytest.mark.slow),
        pytest.param("QLoRA", "zero2", "zero2", marks=pytest.mark.slow),
    ],
)
def test_a_t5_checkpoint_resumes_under_another_backend(
    kind: str, source: str, target: str, outputs: Train
) -> None:
    folder = outputs(kind, source) / "checkpoint-4"
    moved = outputs(kind, target, "--resume_from_checkpoint", folder)
    alone = outputs(kind, "one")
    for mine, theirs in zip(log_in(moved), log_in(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE[kind])
    adapter = adapter_of(moved)
    for key, tensor in adapter_of(alone).items():
        assert torch.allclose(adapter[key], tensor, atol=TOLERANCE[kind], rtol=0), key


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
@pytest.mark.parametrize("case", ["too few rows", "frozen rows"])
def test_added_or_frozen_rows_are_the_same_on_every_backend(
    case: str, backend: str, outputs: Train, tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flags: list[str | Path] = ["--train_new_tokens", "False"]
    if case == "too few rows":
        model = tmp_path_factory.getbasetemp() / "small"
        if not model.exists():
            make_t5(model, AutoTokenizer.from_pretrained(tiny_t5), rows=TOKENS)
        flags = ["--model_name_or_path", model]
    alone, output = outputs("LoRA", "one", *flags), outputs("LoRA", backend, *flags)
    expected, adapter = adapter_of(alone), adapter_of(output)
    assert {*adapter} == {*expected}
    for key, tensor in expected.items():
        assert torch.allclose(adapter[key], tensor, atol=1e-5, rtol=0), key
    state = load_file(output / "non_lora_state.safetensors")
    more = 16 if case == "too few rows" else 32
    assert state["shared.weight"].shape == state["lm_head.weight"].shape == (TOKENS + more, 64)
    for name, rows in adapter.items():
        if "trainable_tokens" in name:
            matrix = state["lm_head.weight" if "lm_head" in name else "shared.weight"]
            mean = matrix[:TOKENS].mean(0)
            still = torch.allclose(rows, mean.expand_as(rows), atol=1e-6)
            assert still == (case == "frozen rows"), name


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "kills"), [("one process", 2), ("ZeRO-3 x 2", 3)])
def test_a_t5_run_that_is_killed_repeatedly_ends_as_one_without_kills(
    backend: str, kills: int, tiny_t5: Path, tmp_path: Path
) -> None:
    # The answers are made longer: short pairs are dropped, and many dropped pairs are an error.
    longer = [[asked, f"{answer} That is all I know."] for asked, answer in dialogues()]
    file = write_dialogues(tmp_path / "data.json", *longer)
    given = ["--model_name_or_path", str(tiny_t5), "--data_path", str(file)]
    found = sweep(backend, kills, tmp_path, given)
    assert found.kills.total() == kills
    assert not found.differences


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_a_t5_in_bf16_stays_near_fp32(backend: str, outputs: Train) -> None:
    exact = log_in(outputs("LoRA", "one"))
    rounded = log_in(outputs("LoRA", backend, "--mixed_precision", "bf16"))
    for mine, theirs in zip(rounded, exact, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["one", "zero2", "zero3"])
def test_a_t5_in_4_bits_and_bf16_stays_near_fp32_and_keeps_wo_in_fp32(
    backend: str, outputs: Train, tmp_path: Path
) -> None:
    exact = log_in(outputs("QLoRA", "one"))
    file = ["--deepspeed", share_all_file(tmp_path)] if backend == "zero3" else []
    output = outputs("QLoRA", backend, "--mixed_precision", "bf16", *file)
    for mine, theirs in zip(log_in(output), exact, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-2)
    # Only wo is in fp32: two encoder and two decoder layers, each 64 x 128.
    whole = 4 * 64 * 128 * 4
    for rank in held(output):
        share = whole // 2 if backend == "zero3" else whole
        assert rank["fp32"] == {"whole": whole, "held": share}
