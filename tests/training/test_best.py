"""The best checkpoint is kept and its adapter saved; a run without improvement ends early."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from loop.checkpoint.storage import list_folders
from loop.training import evaluation
from tests.checkpoint.test_storage import cut_off, same
from tests.conftest import trainer
from tests.support.helpers import adapter_of, launch, write_dialogues
from tests.support.matrix import share_all_file
from tests.training.test_evaluation import LOG, TRAINED, Train, evaluations, held_out, train

__all__ = ["held_out", "train"]


@pytest.mark.parametrize("kind", ["decoder", "T5"])
def test_the_best_checkpoint_survives_the_limit_and_its_adapter_is_saved(
    kind: str, request: pytest.FixtureRequest, held_out: Path, tmp_path: Path
) -> None:
    model = request.getfixturevalue("tiny_t5" if kind == "T5" else "tiny_model")
    data = write_dialogues(tmp_path / "trained.json", *TRAINED)
    flags = (*LOG, "--eval_data_path", held_out, "--eval_steps", "1", "--data_path", data)
    flags += ("--warmup_ratio", "0.4", "--save_steps", "1", "--save_total_limit", "1")
    flags += ("--load_best_model_at_end", "True")
    # Learning rates that soon raise the held-out loss. The CPU decides which of them does.
    for rate in ("1", "30", "3", "5", "2", "8"):
        output = trainer(model, tmp_path)(f"run-{rate}", *flags, "--learning_rate", rate)
        losses = [entry["eval_loss"] for entry in evaluations(output)]
        best = losses.index(min(losses[1:])) + 1  # Step 1 has learning rate 0.
        if best < 6:
            break
    assert best < 6
    assert [folder.name for folder in list_folders(output)] == [
        "checkpoint-6",
        f"checkpoint-{best}",
    ]
    saved, kept = adapter_of(output), adapter_of(output / f"checkpoint-{best}")
    for name, tensor in saved.items():
        if name in kept:
            assert torch.equal(tensor, kept[name])
    assert not all(
        torch.equal(saved[name], tensor)
        for name, tensor in adapter_of(output / "checkpoint-6").items()
        if name in saved
    )
    state = json.loads((output / "trainer_state.json").read_text())
    assert (state["best_step"], state["best_metric"]) == (best, min(losses[1:]))
    assert state["global_step"] == 6


@pytest.mark.slow
def test_under_zero3_the_best_checkpoints_adapter_is_saved(
    tiny_model: Path, held_out: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo"], ["And?", "So."])
    flags: list[str | Path] = ["--model_name_or_path", tiny_model, "--data_path", data]
    flags += ["--max_steps", "5", "--learning_rate", "3", "--warmup_ratio", "0.4"]
    flags += ["--eval_data_path", held_out, "--eval_steps", "1", "--load_best_model_at_end", "True"]
    flags += ["--deepspeed", share_all_file(tmp_path)]
    launch("zero3", tmp_path / "run", *flags, processes=2)
    losses = [entry["eval_loss"] for entry in evaluations(tmp_path / "run")]
    best = losses.index(min(losses[1:])) + 1
    assert best < 5
    assert same(tmp_path / "run", tmp_path / f"run/checkpoint-{best}")


def test_without_improvement_the_run_ends_early_and_is_finished(
    train: Train, tmp_path: Path
) -> None:
    flags = ("--learning_rate", "3", "--eval_steps", "1", "--early_stopping_patience", "2")
    output = train("run", *flags, "--max_steps", "20", "--warmup_ratio", "0.4")
    losses = [entry["eval_loss"] for entry in evaluations(output)]
    ended, best = len(losses), losses.index(min(losses[1:])) + 1
    assert ended == best + 2 < 20
    state = json.loads((output / "trainer_state.json").read_text())
    assert (state["finished"], state["global_step"], state["max_steps"]) == (True, ended, 20)
    assert [folder.name for folder in list_folders(output)] == [f"checkpoint-{ended}"]
    # A kill between the last checkpoint and the final save changes nothing.
    run = shutil.copytree(output, tmp_path / "again")
    cut_off(run, after=ended)
    train("again", *flags, "--max_steps", "20", "--warmup_ratio", "0.4")
    assert same(run, output)


def test_a_corrupt_best_checkpoint_is_named(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    finish = evaluation.Evaluator.finish

    def damaged(self: Any) -> Any:
        folder = tmp_path / f"run/checkpoint-{self.known['best_step']}"
        (folder / "adapter_model.safetensors").write_bytes(b"")
        return finish(self)

    monkeypatch.setattr(evaluation.Evaluator, "finish", damaged)
    flags = ("--learning_rate", "15", "--eval_steps", "1", "--warmup_ratio", "0.4")
    with pytest.raises(UserError, match=r"--load_best_model_at_end: .*checkpoint-\d: damaged"):
        train("run", *flags, "--load_best_model_at_end", "True")
