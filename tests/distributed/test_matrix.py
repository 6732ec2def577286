"""Every backend trains the same adapter: {LoRA, QLoRA} x {one process, DDP, ZeRO-1, -2, -3}."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.helpers import adapter_of, write_dialogues
from tests.support.matrix import BACKENDS, TOLERANCE, Train, held, log_in, logits_of, trainings

# The value of --lora_bias for each kind. Each value is saved under ZeRO-3.
BIAS = {"LoRA": "all", "QLoRA": "lora_only"}
QUICK = [("LoRA", "zero3"), ("QLoRA", "zero3")]
# (kind, backend of the checkpoint, backend of the resumed run): each backend is on both sides.
MOVES = [
    *[("LoRA", "one", to) for to in ("ddp", "zero1", "zero2", "zero3")],
    *[("LoRA", backend, "one") for backend in ("ddp", "zero1", "zero2", "zero3")],
    *[("LoRA", "ddp", "zero2"), ("LoRA", "zero2", "zero3"), ("LoRA", "zero3", "ddp")],
    *[("QLoRA", "zero2", "zero2"), ("QLoRA", "zero3", "zero3")],
    *[("QLoRA", "one", "zero3"), ("QLoRA", "zero3", "zero2"), ("QLoRA", "zero2", "one")],
]
QUICK_MOVES = [("LoRA", "one", "zero3"), ("QLoRA", "zero3", "zero3")]
ALL = [
    pytest.param(kind, backend, marks=[] if (kind, backend) in QUICK else pytest.mark.slow)
    for kind in BIAS
    for backend in [*BACKENDS][1:]
]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten dialogues of very different lengths."""
    file = tmp_path_factory.mktemp("data") / "dialogues.json"
    texts = [["What is " + "very " * (3 * n) + "long?", "No " + "idea. " * n] for n in range(10)]
    return write_dialogues(file, *texts)


@pytest.fixture(scope="module")
def outputs(biased_model: Path, dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    flags = {kind: ["--lora_bias", bias] for kind, bias in BIAS.items()}
    return trainings(tmp_path_factory.mktemp("runs"), biased_model, dialogues, flags)


@pytest.mark.parametrize(("kind", "backend"), ALL)
def test_every_backend_has_the_losses_and_the_adapter_of_one_process(
    kind: str, backend: str, outputs: Train
) -> None:
    alone, output = outputs(kind, "one"), outputs(kind, backend)
    assert [entry["step"] for entry in log_in(output)] == [*range(1, 9)]
    for mine, theirs in zip(log_in(output), log_in(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE[kind])
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=10 * TOLERANCE[kind])
        assert mine["supervised_tokens"] == theirs["supervised_tokens"]
    expected, adapter = adapter_of(alone), adapter_of(output)
    assert {*adapter} == {*expected}
    for key, tensor in expected.items():
        assert adapter[key].dtype == tensor.dtype == torch.float32
        assert torch.allclose(adapter[key], tensor, atol=TOLERANCE[kind], rtol=0), key


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [
        move if move in QUICK_MOVES else pytest.param(*move, marks=pytest.mark.slow)
        for move in MOVES
    ],
)
def test_a_checkpoint_resumes_under_any_other_backend_and_number_of_ranks(
    kind: str, source: str, target: str, outputs: Train
) -> None:
    folder = outputs(kind, source) / "checkpoint-4"
    moved = outputs(kind, target, "--resume_from_checkpoint", folder)
    alone = outputs(kind, "one")
    for mine, theirs in zip(log_in(moved), log_in(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=TOLERANCE[kind])
        assert mine["supervised_tokens"] == theirs["supervised_tokens"]
    adapter = adapter_of(moved)
    for key, tensor in adapter_of(alone).items():
        assert torch.allclose(adapter[key], tensor, atol=TOLERANCE[kind], rtol=0), key


@pytest.mark.parametrize("kind", [*BIAS])
def test_the_loss_falls_and_the_gradient_is_clipped(kind: str, outputs: Train) -> None:
    # Without training or clipping, all backends would trivially agree.
    log = log_in(outputs(kind, "one"))
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    assert max(entry["grad_norm"] for entry in log) > 1.0
    adapter = adapter_of(outputs(kind, "one"))
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize(("kind", "backend"), [("LoRA", "one"), ("QLoRA", "one"), *ALL])
def test_peft_loads_the_adapter_and_has_the_logits_of_the_trained_model(
    kind: str, backend: str, outputs: Train, biased_model: Path
) -> None:
    output = outputs(kind, backend)
    trained = load_file(output / "logits.safetensors")["logits"]
    base, loaded = logits_of(biased_model, output, four_bit=kind == "QLoRA")
    assert torch.allclose(loaded, trained, atol=1e-4, rtol=0)
    assert (base - trained).abs().max() > 0.01  # The adapter changes the logits.


def test_under_zero3_each_rank_holds_half_of_the_4_bit_weights(outputs: Train) -> None:
    whole = held(outputs("QLoRA", "one"))[0]["four_bit"]
    # Two layers have 64 x 64 + 2 x 32 x 64 + 64 x 64 + 3 x 64 x 128 weights of half a byte each.
    assert whole == {"whole": 36_864, "held": 36_864}
    for rank in held(outputs("QLoRA", "zero3")):
        assert rank["four_bit"] == {"whole": 36_864, "held": 18_432}


def test_under_zero3_each_rank_holds_half_of_the_plain_weights(outputs: Train) -> None:
    for rank in held(outputs("LoRA", "zero3")):
        assert rank["base"]["held"] == pytest.approx(rank["base"]["whole"] / 2, rel=0.001)


def test_a_save_needs_memory_for_the_adapter_not_for_the_model(outputs: Train) -> None:
    # The base model has 25 MB, half of them in one matrix; the adapter has 0.02 MB.
    for rank in held(outputs("LoRA", "zero3")):
        assert rank["saving"]["held"] < rank["saving"]["whole"] / 4


@pytest.mark.parametrize("bias", ["all", "lora_only", pytest.param("none", marks=pytest.mark.slow)])
def test_the_saved_keys_are_exactly_the_expected_ones_under_zero3(
    bias: str, outputs: Train
) -> None:
    kind = next((kind for kind, trained in BIAS.items() if trained == bias), "LoRA")
    output = outputs(kind, "zero3", *(("--lora_bias", "none") if bias == "none" else ()))
    targets = {"q_proj", "v_proj"}
    every = {"q_proj", "k_proj", "v_proj", "o_proj"}
    biased = {"all": every, "lora_only": targets, "none": set()}[bias]
    expected = set()
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}.self_attn."
        expected |= {f"{prefix}{t}.lora_{x}.weight" for t in targets for x in "AB"}
        # peft names the bias of a target by the wrapped layer.
        expected |= {f"{prefix}{t}{'.base_layer' * (t in targets)}.bias" for t in biased}
    assert {*adapter_of(output)} == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*BIAS])
def test_under_zero3_no_rank_loads_a_private_unpartitioned_copy(
    kind: str, outputs: Train, chat_model: Path
) -> None:
    # 270 MB in bf16 is enough to be visible in the memory of a process.
    real = ("--model_name_or_path", chat_model, "--max_steps", "2", "--mixed_precision", "bf16")
    for rank in held(outputs(kind, "zero3", *real)):
        share = 1.0 if kind == "QLoRA" else 0.5  # A 4-bit model is partitioned after it is loaded.
        # A private copy would be added to the partition. Libraries allocate about 80 MB.
        assert rank["loading"]["held"] < (share + 0.5) * rank["loading"]["whole"] + 100e6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
def test_bf16_stays_near_fp32(backend: str, outputs: Train) -> None:
    exact = log_in(outputs("LoRA", "one"))
    rounded = log_in(outputs("LoRA", backend, "--mixed_precision", "bf16"))
    for mine, theirs in zip(rounded, exact, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-2)
