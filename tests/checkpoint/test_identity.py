"""Another data set, another weight and another base model are never taken for the run's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import UserError
from loop import train as training
from loop.checkpoint.identity import run_facts
from loop.checkpoint.run_folder import is_finished
from loop.config.flags import Config
from loop.config.load import read_config
from loop.inputs.training_data import read_training_data
from tests.conftest import trainer
from tests.support.helpers import log_of, write_dialogues

HI, WHY = ["Hi", "Hello you."], ["Why so?", "Because it is so."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    write_dialogues(tmp_path / "data" / "a.json", *[HI] * 4)
    write_dialogues(tmp_path / "data" / "b.json", *[WHY] * 4)
    return tmp_path / "data"


def test_a_folders_weight_is_not_that_of_its_last_file(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = trainer(tiny_model, tmp_path)
    whole, last = [f"{folder}:0.5"], [str(folder / "a.json"), f"{folder / 'b.json'}:0.5"]
    flags = ["--preprocessed_path", str(tmp_path / "cache"), "--max_steps", "2"]
    flags += ["--per_device_train_batch_size", "2", "--data_path"]
    run("whole", *flags, *whole)
    settings = ["--config", str(tmp_path / "whole" / "training_config.yaml")]
    assert is_finished(read_config(settings, Config))
    with pytest.raises(UserError, match="data_sources was"):
        is_finished(read_config([*settings, "--data_path", *last], Config))
    resume = ["--resume_from_checkpoint", str(tmp_path / "whole")]
    with pytest.raises(UserError, match="data sources was"):
        run("other", *flags, *last, *resume)
    run("last", *flags, *last)  # The cache has another hash, and is encoded again.
    assert log_of(tmp_path / "whole")[-1]["epoch"] != log_of(tmp_path / "last")[-1]["epoch"]


def test_evaluation_data_that_is_named_otherwise_is_read_again(
    folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = trainer(tiny_model, tmp_path)
    flags = [
        "--preprocessed_path",
        str(tmp_path / "cache"),
        "--max_steps",
        "2",
        "--eval_steps",
        "1",
    ]
    flags += ["--data_path", str(folder), "--eval_data_path"]
    run("folder", *flags, str(folder))
    found = log_of(run("files", *flags, str(folder / "a.json"), str(folder / "b.json")))
    assert any("eval_loss" in entry for entry in found)


def test_a_run_whose_data_is_removed_while_it_trains_is_saved(
    folder: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = training.write_settings

    def remove_data(*given: Any) -> None:
        shutil.rmtree(folder)
        write(*given)

    monkeypatch.setattr(training, "write_settings", remove_data)
    run = trainer(tiny_model, tmp_path)("run", "--data_path", str(folder), "--max_steps", "2")
    assert json.loads((run / "trainer_state.json").read_text())["data_sources"] == [[2, 1.0]]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_one_replaced_matrix_makes_another_base_model(
    form: str, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = load_file(base / "model.safetensors")
    if form == "bin":
        (base / "model.safetensors").unlink()

    def facts() -> dict[str, object]:
        if form == "bin":
            torch.save(weights, base / "pytorch_model.bin")
        else:
            save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        config = Config(model_name_or_path=str(base), data_path=(str(folder),))
        return run_facts(config, read_training_data(config), 8)

    before, changed = facts(), 0
    assert facts() == before
    for name, weight in [*weights.items()]:
        weights[name] = weight + 1
        changed += (
            facts()["base model (sample of each tensor)"]
            != before["base model (sample of each tensor)"]
        )
        weights[name] = weight
    assert changed == len(weights)
