"""LoRA on experts trains alike on one process, DDP, ZeRO-2 and ZeRO-3, and resumes exactly."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.conftest import small_tokenizer
from tests.support.helpers import adapter_of, write_dialogues
from tests.support.matrix import Train, log_in, trainings
from tests.support.tiny_models import save_tiny

pytestmark = pytest.mark.slow
# Dense, shared and routed experts; and experts alone.
KINDS = ["deepseek_v3", "mixtral"]
FLAGS = ["--lora_target_modules", "all-linear"]


@pytest.fixture(scope="module", params=KINDS)
def runs(
    request: pytest.FixtureRequest, chat_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Train:
    folder = tmp_path_factory.mktemp(request.param)
    base = save_tiny(request.param, folder / "base", small_tokenizer(chat_tokenizer))
    texts = [["What is " + "very " * (3 * n) + "long?", "No " + "idea. " * n] for n in range(10)]
    data = write_dialogues(folder / "dialogues.json", *texts)
    return trainings(folder, base, data, {"LoRA": FLAGS})


@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
def test_experts_train_as_on_one_process(backend: str, runs: Train) -> None:
    alone, output = runs("LoRA", "one"), runs("LoRA", backend)
    for mine, theirs in zip(log_in(output), log_in(alone), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-4)
    expected, adapter = adapter_of(alone), adapter_of(output)
    assert {*adapter} == {*expected}
    for key, tensor in expected.items():
        # Adam divides gradients that are rounding alone by their own size.
        assert torch.allclose(adapter[key], tensor, atol=1e-3, rtol=0), key
        assert "lora_B" not in key or adapter[key].abs().max() > 0, key


def test_checkpointing_recomputes_the_routing_of_the_forward_pass(runs: Train) -> None:
    plain = runs("LoRA", "one")
    recomputed = runs("LoRA", "one", "--gradient_checkpointing", "True")
    for mine, theirs in zip(log_in(recomputed), log_in(plain), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-6)
    expected = adapter_of(plain)
    for key, tensor in adapter_of(recomputed).items():
        assert torch.allclose(tensor, expected[key], atol=1e-5, rtol=0), key


def test_a_resumed_run_has_the_same_bits(runs: Train) -> None:
    whole = runs("LoRA", "one")
    resumed = runs("LoRA", "one", "--resume_from_checkpoint", whole / "checkpoint-4")
    expected = adapter_of(whole)
    for key, tensor in adapter_of(resumed).items():
        assert torch.equal(tensor, expected[key]), key


def test_plain_peft_loads_the_adapter(runs: Train) -> None:
    output = runs("LoRA", "zero3")
    base = AutoModelForCausalLM.from_pretrained(output.parent / "base")
    loaded = PeftModel.from_pretrained(base, output)
    parameters = dict(loaded.named_parameters())
    for key, tensor in adapter_of(output).items():
        name = key.replace(".weight", ".default.weight")
        assert torch.equal(parameters[name], tensor), name
