"""On one GPU, every backend trains the same adapter; skipped without a GPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.helpers import adapter_of, command, launch, write_dialogues

EXACT = ["--mixed_precision", "no", "--lora_dropout", "0", "--learning_rate", "1e-2"]
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def train(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, gpu_in_sight: None) -> Any:
    """Return a function that trains six steps on the GPU, and returns the log and the adapter."""
    folder = tmp_path_factory.mktemp("gpu")
    texts = [["What is " + "very " * (3 * n) + "long?", "No " + "idea. " * n] for n in range(10)]
    data = write_dialogues(folder / "dialogues.json", *texts)

    def run(config: str, four_bit: bool, *flags: str) -> tuple[list[dict[str, Any]], Any]:
        output = folder / f"{config}-{four_bit}-{'-'.join(flags)}".replace("/", "_")
        launch(
            config,
            output,
            *("--model_name_or_path", tiny_model, "--data_path", data, "--max_steps", "6"),
            *("--global_batch_size", "4", "--per_device_train_batch_size", "2"),
            *("--logging_steps", "1", "--q_lora", str(four_bit), *EXACT, *flags),
        )
        log = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return log, adapter_of(output)

    return run


@pytest.mark.parametrize("four_bit", [False, True])
def test_zero3_on_a_gpu_gives_the_losses_and_the_adapter_of_the_plain_backend(
    four_bit: bool, train: Any
) -> None:
    log, adapter = train("single_gpu", four_bit)
    sharded_log, sharded = train("zero3", four_bit)
    for mine, theirs in zip(sharded_log, log, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert {*sharded} == {*adapter}
    for key, tensor in adapter.items():
        assert torch.allclose(sharded[key], tensor, atol=1e-4, rtol=0), key
    assert log[-1]["loss"] < log[0]["loss"] - 0.05


def test_fp16_with_loss_scaling_stays_near_fp32(train: Any) -> None:
    exact, _ = train("single_gpu", False, "--lora_r", "4")
    halved, _ = train("single_gpu", False, "--lora_r", "4", "--mixed_precision", "fp16")
    # The first updates may be skipped while the loss scale falls. The first loss is before them.
    assert halved[0]["loss"] == pytest.approx(exact[0]["loss"], abs=2e-2)
    assert halved[-1]["loss"] < halved[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "qlora"])
@pytest.mark.parametrize(("shape", "length"), [("llama-1b", 2048), ("llama-7b", 8192)])
def test_large_shapes_train_in_rows_of_long_dialogues(
    shape: str, length: int, kind: str, gpu_in_sight: None, tmp_path: Path
) -> None:
    """The models have random weights in bf16. Prints the table for benchmarks/RESULTS.md."""
    done = command(
        *(sys.executable, "benchmarks/step/run.py", "--model", shape, "--kind", kind),
        *("--precision", "bf16", "--data", "long", "--model_max_length", str(length)),
        *("--batch", "4", "--steps", "6", "--runs", "1", "--systems", "bare", "loop", "trl"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "this project" in done.stdout
