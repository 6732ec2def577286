"""A restarted run resumes from its own checkpoints and deletes no others."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import RunError, Stopped, UserError
from loop.checkpoint import storage
from loop.checkpoint.storage import CorruptCheckpoint, check_room, list_folders, prune, verify
from loop.distributed import optimizer_state
from loop.distributed.signals import LAUNCH_NAME, _convert_disk_errors, is_restart, record_launch
from tests.checkpoint.test_storage import damage, same
from tests.support.helpers import log_of

Train = Callable[..., Path]
SIX = ("--max_steps", "6", "--lora_dropout", "0.3", "--logging_steps", "1", "--save_steps", "2")
STOP = ("--max_minutes", "1e-6")


def stopped(train: Train, *flags: str | Path) -> str:
    """Train one step; return the message of the stop."""
    with pytest.raises(Stopped) as found:
        train("run", *SIX, *STOP, *flags)
    return str(found.value)


def names(output: Path) -> list[str]:
    return [folder.name for folder in list_folders(output)]


def test_starting_afresh_applies_once_per_launch(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    stopped(train)
    monkeypatch.setenv(LAUNCH_NAME, "first")
    afresh = ("--resume_from_checkpoint", "False")
    assert "command, without --resume_from_checkpoint, resumes" in stopped(train, *afresh)
    assert names(output) == ["checkpoint-1"]
    assert len([*output.glob("discarded-*/checkpoint-1")]) == 1
    # torchelastic and --until-done restart the same launch with the same flags.
    stopped(train, *afresh)
    assert names(output) == ["checkpoint-2", "checkpoint-1"]
    monkeypatch.setenv(LAUNCH_NAME, "second")
    stopped(train, *afresh)
    assert names(output) == ["checkpoint-1"]
    assert len([*output.glob("discarded-*/metrics.jsonl")]) == 2


def test_a_named_checkpoint_is_used_until_the_launch_has_saved_its_own(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train("other", *SIX)
    named = ("--resume_from_checkpoint", other / "checkpoint-4")
    stopped(train)  # another run's checkpoint, which must not be resumed
    monkeypatch.setenv(LAUNCH_NAME, "first")
    stopped(train, *named)
    assert names(tmp_path / "run") == ["checkpoint-5"]
    shutil.rmtree(tmp_path / "run/checkpoint-5")  # as if the launch had crashed before
    stopped(train, *named)
    assert names(tmp_path / "run") == ["checkpoint-5"]
    assert same(train("run", *SIX, *named), other)
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [*range(1, 7)]


def test_a_torchelastic_restart_is_the_same_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_launch(tmp_path)
    assert not is_restart(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restart(tmp_path)


def test_a_stop_request_survives_a_restart(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_NAME, "first")
    stopped(train)
    (tmp_path / "run/STOP").touch()
    with pytest.raises(Stopped, match="STOP; checkpoint-2"):
        train("run", *SIX)
    monkeypatch.setenv(LAUNCH_NAME, "second")
    train("run", *SIX)


def test_corrupt_checkpoints_are_moved_aside_and_do_not_count_as_kept(
    train: Train, tmp_path: Path
) -> None:
    output = train("run", *SIX)
    (output / "trainer_state.json").unlink()
    damage(output / "checkpoint-6/optimizer.safetensors", "cut")
    shutil.rmtree(output / "checkpoint-2")
    assert "checkpoint-5 is saved" in stopped(train, "--save_total_limit", "1")
    assert names(output) == ["checkpoint-5"]
    assert verify(output / "checkpoint-5").step == 5
    assert [*output.glob("discarded-*/checkpoint-6")]


def test_a_checkpoint_with_another_step_in_its_name_is_refused(
    train: Train, tmp_path: Path
) -> None:
    output = train("run", *SIX)
    (output / "checkpoint-4").rename(output / "checkpoint-99")
    with pytest.raises(CorruptCheckpoint, match="the folder was renamed from checkpoint-4"):
        verify(output / "checkpoint-99")
    (output / "checkpoint-99").rename(output / "best")
    assert verify(output / "best").step == 4


def test_pruning_removes_a_link_but_not_its_target(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    for folder in (target, tmp_path / "checkpoint-3", tmp_path / "checkpoint-7"):
        folder.mkdir()
        (folder / storage.MANIFEST).touch()
    (tmp_path / "checkpoint-2").symlink_to(target)
    prune(tmp_path, 3, 1)
    assert (target / storage.MANIFEST).exists()
    assert names(tmp_path) == ["checkpoint-7", "checkpoint-3"]  # 7 is newer than the step


def test_a_run_that_fitted_on_the_disk_may_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = 12 * 1_000_000 + storage.SMALL
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * each))
    with pytest.raises(UserError, match="3 checkpoints"):
        check_room(tmp_path, 1_000_000, 10, 2)
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    check_room(tmp_path, 1_000_000, 10, 2)


def test_a_run_without_its_log_can_resume(train: Train, tmp_path: Path) -> None:
    output = train("run", *SIX)
    (output / "metrics.jsonl").unlink()
    (output / "trainer_state.json").unlink()
    train("run", *SIX)
    assert log_of(output) == []
    (output / "metrics.jsonl").write_bytes(b"\xff\n")
    (output / "trainer_state.json").unlink()
    train("run", *SIX)


def test_fewer_steps_than_the_checkpoint_has_are_refused(train: Train) -> None:
    train("run", *SIX)
    with pytest.raises(UserError, match="found 6 steps done; expected at most the 3"):
        train("run", *SIX, "--max_steps", "3", "--allow_resume_mismatch")


def test_another_initial_adapter_is_refused(train: Train, tmp_path: Path) -> None:
    first = train("first", *SIX)
    stopped(train, "--lora_weight_path", first)
    with pytest.raises(UserError, match=r"--lora_weight_path .*was .*, is None"):
        train("run", *SIX)


def test_the_loss_scale_is_restored_in_fp16_only() -> None:
    other: Any = SimpleNamespace(mixed_precision="no", scaler=None)
    optimizer_state.put_loss_scale(other, object(), {"scale": 2.0})


def test_a_failed_start_removes_only_a_folder_that_it_created(train: Train, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="nowhere"):
        train("run", "--data_path", tmp_path / "nowhere.json")
    assert (tmp_path / "run").is_dir()
    with pytest.raises(UserError, match="nowhere"):
        train("fresh", "--data_path", tmp_path / "nowhere.json")
    assert not (tmp_path / "fresh").exists()


def test_a_full_disk_is_one_message_wherever_it_occurs(tmp_path: Path) -> None:
    full = Path("/dev/full")
    with pytest.raises(RunError, match="No space left"), _convert_disk_errors():
        full.write_text("x")
    with pytest.raises(FileNotFoundError), _convert_disk_errors():
        (tmp_path / "missing").read_text()
