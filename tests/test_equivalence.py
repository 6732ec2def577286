"""The gradient does not depend on how the work is laid out: real launches, real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import adapter_of, launch, write_dialogues

EXACT = ["--mixed_precision", "no", "--lora_dropout", "0", "--learning_rate", "1e-2"]
PLAIN = "one process, one micro-batch of 4"
LAYOUTS = {
    PLAIN: ("cpu", 1, 4),
    "one process, four micro-batches of 1": ("cpu", 1, 1),
    "ZeRO-2, two processes": ("zero2", 2, 2),
    "ZeRO-2, two processes, two micro-batches of 1": ("zero2", 2, 1),
    "DDP, two processes": ("ddp", 2, 2),
}


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten dialogues of very different lengths: the third window of four is short."""
    file = tmp_path_factory.mktemp("data") / "dialogues.json"
    texts = [["What is " + "very " * (3 * n) + "long?", "No " + "idea. " * n] for n in range(10)]
    return write_dialogues(file, *texts)


@pytest.fixture(scope="module")
def runs(
    tiny_model: Path, dialogues: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """Train once in every layout, two epochs with the same global batch."""
    results = {}
    for number, (name, (config, processes, per_device)) in enumerate(LAYOUTS.items()):
        output = tmp_path_factory.mktemp("runs") / str(number)
        history = launch(
            config,
            output,
            *("--model_name_or_path", tiny_model, "--data_path", dialogues),
            *("--global_batch_size", "4", "--per_device_train_batch_size", str(per_device)),
            *("--num_train_epochs", "2", "--logging_steps", "1", *EXACT),
            processes=processes,
        )
        results[name] = (history, adapter_of(output))
    return results


@pytest.mark.parametrize("name", [*LAYOUTS][1:])
def test_every_layout_gives_the_same_losses_and_the_same_adapter(
    name: str, runs: dict[str, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]
) -> None:
    expected, expected_adapter = runs[PLAIN]
    history, adapter = runs[name]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(history, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=1e-4)
        assert mine["supervised_tokens"] == theirs["supervised_tokens"]
    assert {*adapter} == {*expected_adapter}
    for key, tensor in expected_adapter.items():
        assert torch.allclose(adapter[key], tensor, atol=1e-5, rtol=0), key


def test_the_run_learns_and_the_gradient_was_clipped(
    runs: dict[str, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]],
) -> None:
    # Were nothing learnt or clipped, the layouts could agree for the wrong reason.
    history, adapter = runs[PLAIN]
    assert history[-1]["loss"] < history[0]["loss"] - 0.05
    assert max(entry["grad_norm"] for entry in history) > 1.0
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
