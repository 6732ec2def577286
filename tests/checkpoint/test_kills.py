"""A run that is killed at any moment has, bit for bit, the result of an uninterrupted run."""

from pathlib import Path

import pytest
import torch

from benchmarks.kill_sweep import BACKENDS, dialogues, sweep
from tests.support.helpers import adapter_of, launch, write_dialogues

# benchmarks/kill_sweep.py kills 200 times or more.
KILLS = [
    ("one process", 2),
    *[pytest.param(backend, 5, marks=pytest.mark.slow) for backend in BACKENDS],
]


@pytest.mark.parametrize(("backend", "kills"), KILLS)
def test_a_run_killed_repeatedly_ends_like_one_never_killed(
    backend: str, kills: int, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "data.json", *dialogues())
    given = ["--model_name_or_path", str(tiny_model), "--data_path", str(data)]
    found = sweep(backend, kills, tmp_path, given)
    assert found.kills.total() == kills
    assert not found.differences


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_three_ranks_resume_bit_for_bit(config: str, tiny_model: Path, tmp_path: Path) -> None:
    # A sum of three numbers depends on their order, which depends on the gradient buckets.
    flags = ["--model_name_or_path", tiny_model, "--max_steps", "8", "--save_steps", "4"]
    flags += ["--data_path", write_dialogues(tmp_path / "data.json", *dialogues())]
    flags += ["--global_batch_size", "6", "--per_device_train_batch_size", "1"]
    flags += ["--lora_target_modules", "all-linear", "--mixed_precision", "no"]
    launch(config, tmp_path / "uninterrupted", *flags, processes=3)
    checkpoint = tmp_path / "uninterrupted" / "checkpoint-4"
    flags += ["--resume_from_checkpoint", checkpoint]
    launch(config, tmp_path / "resumed", *flags, processes=3)
    uninterrupted, resumed = (
        adapter_of(tmp_path / "uninterrupted"),
        adapter_of(tmp_path / "resumed"),
    )
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
