"""Checkpoints are small and verified; a run resumes only from its own valid checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from data.errors import RunError, UserError
from loop.checkpoint import saver, storage
from loop.checkpoint.storage import CorruptCheckpoint, list_folders, verify
from tests.conftest import trainer
from tests.support.helpers import ROOT, adapter_of, log_of

Train = Callable[..., Path]
DROPOUT = ("--lora_dropout", "0.3", "--logging_steps", "3", "--max_steps", "6")


def same(one: Path, two: Path) -> bool:
    mine, theirs = adapter_of(one), adapter_of(two)
    return {*mine} == {*theirs} and all(torch.equal(mine[name], theirs[name]) for name in mine)


def cut_off(output: Path, after: int) -> None:
    """Reduce a finished run to the files that a kill after this step leaves."""
    for folder in list_folders(output):
        if int(folder.name.partition("-")[2]) > after:
            shutil.rmtree(folder)
    for name in ("trainer_state.json", "adapter_model.safetensors"):
        (output / name).unlink()


@pytest.fixture(scope="module")
def reference(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints after steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("reference")
    return trainer(tiny_model, folder)("run", *DROPOUT, "--save_steps", "2")


@pytest.fixture
def saved(reference: Path, tmp_path: Path) -> Path:
    """A copy of the reference run in the folder that `train` uses."""
    return shutil.copytree(reference, tmp_path / "run")


def test_a_checkpoint_is_small_without_pickles_and_peft_loads_it(
    saved: Path, tiny_model: Path
) -> None:
    folder = saved / "checkpoint-4"
    assert {path.name for path in folder.iterdir()} == {
        *("manifest.json", "progress.json", "trainer_state.json", "adapter_config.json"),
        *("adapter_model.safetensors", "optimizer.safetensors"),
    }
    weights = load_file(folder / "adapter_model.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size <= 4 * 4 * sum(tensor.numel() for tensor in weights.values()) + 1e6
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    moments = load_file(folder / "optimizer.safetensors")
    assert moments.pop("step") == 4
    assert {name.partition(".")[2] for name in moments} == {*weights}
    progress = json.loads((folder / "progress.json").read_text())
    # Two dialogues are one window and one epoch.
    assert [progress[key] for key in ("step", "epoch", "cursor", "examples")] == [4, 4.0, 0, 8]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["world_size"], manifest["backend"]) == (1, 1, "NO")
    assert manifest["facts"]["--seed"] == 42
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state == {"global_step": 4, "epoch": 4.0, "max_steps": 6}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    assert any(tensor.any() for name, tensor in loaded.state_dict().items() if "lora_B" in name)


def test_a_killed_run_resumes_to_the_same_adapter_and_log(
    saved: Path, reference: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off(saved, after=4)
    (saved / ".checkpoint-6.partial").mkdir()
    with (saved / "metrics.jsonl").open("a") as log:
        log.write('{"step": 9, "lo')
    train("run", *DROPOUT, "--save_steps", "2")
    assert f"resume: {saved / 'checkpoint-4'}, after step 4 of 6" in capsys.readouterr().out
    assert same(saved, reference)
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm", "supervised_tokens")
    # The log entry after step 6 covers steps 4 to 6. The loss of step 4 is from the checkpoint.
    assert [[e[k] for k in keys] for e in log_of(saved)] == [
        [e[k] for k in keys] for e in log_of(reference)
    ]
    assert log_of(saved)[-1]["seconds"] > log_of(reference)[1]["seconds"]
    assert not (saved / ".checkpoint-6.partial").exists()


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "removed":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def test_every_truncated_altered_or_missing_file_is_detected(saved: Path) -> None:
    folder = saved / "checkpoint-4"
    assert verify(folder).step == 4
    for name in [*storage.FILES, storage.MANIFEST]:
        kept = (folder / name).read_bytes()
        for how in ("removed", "cut", "flipped"):
            damage(folder / name, how)
            with pytest.raises(CorruptCheckpoint, match=name):
                verify(folder)
            (folder / name).write_bytes(kept)
    assert verify(folder).step == 4


def test_a_corrupt_checkpoint_is_reported_and_an_older_one_resumed(
    saved: Path, reference: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off(saved, after=4)
    damage(saved / "checkpoint-4/optimizer.safetensors", "flipped")
    train("run", *DROPOUT, "--save_steps", "2")
    output = capsys.readouterr().out
    assert "checkpoint-4: corrupt: optimizer.safetensors: found" in output
    assert "checkpoint-2, after step 2 of 6" in output
    assert same(saved, reference)
    verify(saved / "checkpoint-4")  # written again


def test_without_a_valid_checkpoint_the_run_stops_and_starting_afresh_keeps_them(
    saved: Path, reference: Path, train: Train
) -> None:
    cut_off(saved, after=2)
    damage(saved / "checkpoint-2/progress.json", "cut")
    with pytest.raises(UserError, match=r"progress\.json.*no valid checkpoint"):
        train("run", *DROPOUT, "--save_steps", "2")
    train("run", *DROPOUT, "--save_steps", "2", "--resume_from_checkpoint", "False")
    assert same(saved, reference)
    (aside,) = saved.glob("discarded-*")
    assert (aside / "checkpoint-2").is_dir()


def test_other_settings_are_refused_with_the_difference(saved: Path, train: Train) -> None:
    cut_off(saved, after=4)
    with pytest.raises(
        UserError, match="checkpoint-4: other data or settings: --seed was 42, is 7"
    ):
        train("run", *DROPOUT, "--seed", "7")
    with pytest.raises(UserError, match=r"template was chat \w+, is vicuna"):
        train("run", *DROPOUT, "--template", "vicuna")
    with pytest.raises(
        UserError, match=r"step was 2, is 1; .* on 1 rank.*--global_batch_size 2, or"
    ):
        train("run", *DROPOUT, "--per_device_train_batch_size", "1")
    with pytest.raises(UserError, match=r"has .*lora_A.* \(8, 64\), the model \(4, 64\)"):
        train("run", *DROPOUT, "--lora_r", "4", "--allow_resume_mismatch")
    train("run", *DROPOUT, "--seed", "7", "--allow_resume_mismatch")
    # Twice one example is the same global batch.
    cut_off(saved, after=4)
    split = ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2")
    train("run", *DROPOUT, *split)


def test_other_data_is_refused(saved: Path, train: Train, tmp_path: Path) -> None:
    cut_off(saved, after=4)
    data = tmp_path / "data.json"
    data.write_text(data.read_text().replace("Hello", "Hullo"))
    with pytest.raises(UserError, match=r"data \(SHA-256\) was \w+\.\.\., is"):
        train("run", *DROPOUT)


def test_another_base_model_of_the_same_shape_is_refused(
    saved: Path, train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    cut_off(saved, after=4)
    shutil.copytree(tiny_model, tmp_path / "other")
    weights = tmp_path / "other/model.safetensors"
    with weights.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")
    with pytest.raises(UserError, match=r"base model \(sampled SHA-256\) was"):
        train("run", *DROPOUT, "--model_name_or_path", tmp_path / "other")


def test_a_newer_format_is_refused(saved: Path, train: Train) -> None:
    cut_off(saved, after=4)
    file = saved / "checkpoint-4/manifest.json"
    manifest = json.loads(file.read_text()) | {"format": 2}
    manifest["manifest_sha256"] = storage._own_sha256(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="written in format 2 by a newer"):
        train("run", *DROPOUT)


def test_a_named_checkpoint_folder_is_resumed(saved: Path, train: Train, tmp_path: Path) -> None:
    other = train("other", *DROPOUT, "--resume_from_checkpoint", saved / "checkpoint-4")
    assert same(saved, other)
    assert [e["step"] for e in log_of(other)] == [e["step"] for e in log_of(saved)]
    with pytest.raises(UserError, match="found no checkpoint; expected a folder"):
        train("third", "--resume_from_checkpoint", tmp_path / "nowhere")


def test_save_total_limit_is_the_number_of_kept_checkpoints(train: Train) -> None:
    folder = train("run", *DROPOUT, "--save_steps", "1", "--save_total_limit", "2")
    assert [path.name for path in list_folders(folder)] == ["checkpoint-6", "checkpoint-5"]
    assert not list_folders(train("none", "--save_strategy", "no"))
    minutes = train("minutes", *DROPOUT, "--save_minutes", "1e-9")
    assert len(list_folders(minutes)) == 6


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_an_error_before_training(
    train: Train, small_disk: Path
) -> None:
    with pytest.raises(UserError, match=r"MB free; expected .* MB for 4 checkpoints"):
        train("run", "--output_dir", small_disk / "run", "--save_steps", "1")


def test_a_full_disk_ends_the_run_and_older_checkpoints_stay(
    train: Train, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Like under a quota, the reported free space is more than what can be written.
    monkeypatch.setattr(storage, "check_room", lambda *_: None)
    (small_disk / "ballast").write_bytes(bytes(2_800_000))
    with pytest.raises(RunError, match=r"cannot be written: .*No space left on device"):
        train("run", "--output_dir", small_disk / "run", "--save_steps", "1", "--max_steps", "40")
    folders = list_folders(small_disk / "run")
    assert folders
    assert all(verify(folder) for folder in folders)
    assert not [*(small_disk / "run").glob(".checkpoint-*")]


def test_weights_that_are_not_finite_are_not_saved(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gather = saver.trained_parameters

    def spoilt(*arguments: Any, **more: Any) -> Any:
        found = gather(*arguments, **more)
        spoil = (tmp_path / "run/checkpoint-2").exists()
        return {name: tensor * torch.nan if spoil else tensor for name, tensor in found.items()}

    monkeypatch.setattr(saver, "trained_parameters", spoilt)
    with pytest.raises(RunError, match=r"step \d: .* is not finite"):
        train("run", *DROPOUT, "--save_steps", "2")
    assert all(verify(folder) for folder in list_folders(tmp_path / "run"))


def test_a_read_only_disk_is_a_user_error(train: Train, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="cannot be written: Read-only file system"):
        train("run", "--output_dir", small_disk / "run")


def test_a_folder_locked_by_another_run_is_refused_with_its_owner(
    train: Train, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    code = (
        "from loop.config.flags import Config\n"
        "from loop.checkpoint.run_folder import locked_output_dir\n"
        f"with locked_output_dir(Config(output_dir={str(folder)!r})):\n"
        "    print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout
    while b"held" not in holder.stdout.readline():
        assert holder.poll() is None
    with pytest.raises(UserError, match=rf"writes to it: process {holder.pid} of .*, since 2"):
        train("run")
    holder.kill()
    holder.wait()
    train("run")
