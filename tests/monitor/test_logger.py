"""Trackers get every log entry; a failing tracker never stops training."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest

from data.errors import Stopped
from tests.conftest import trainer
from tests.support.helpers import command, log_of, write_dialogues

BLOCK = 32768


def read_wandb(file: Path) -> list[Any]:
    """Return the records of a `.wandb` file: a 7-byte header, then a LevelDB log (wandb 0.31)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, records, parts = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no header fits, so the rest of the block is padding
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a complete record, or the last part of a record
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def tensorboard_losses(output: Path) -> list[tuple[int, Any]]:
    """Return steps and losses; TensorBoard stores fp32, so losses are approximate."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (output / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Scalars("train/loss")
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in scalars]


def train(tiny_model: Path, folder: Path, *flags: str, **env: str) -> Any:
    data = write_dialogues(folder / "data.json", ["Hi", "Hello there."], ["And?", "So."])
    return command(
        "python", "loop/train.py",
        "--model_name_or_path", tiny_model,
        "--data_path", data,
        "--output_dir", folder / "run",
        "--learning_rate", "1e-2",
        "--max_steps", "3",
        "--logging_steps", "1",
        "--report_to", *flags,
        WANDB_API_KEY="",
        NETRC=str(folder / "no-netrc"),
        HOME=str(folder),
        **env,
    )  # fmt: skip


def test_wandb_offline_and_tensorboard_hold_every_logged_step(
    tiny_model: Path, tmp_path: Path
) -> None:
    done = train(tiny_model, tmp_path, "wandb", "tensorboard")
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stdout
    history = log_of(tmp_path / "run")
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    rows = []
    records = read_wandb(file)
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): float(i.value_json) for i in items})
    assert [row["_step"] for row in rows] == [1, 2, 3]
    keys = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    for row, entry in zip(rows, history, strict=True):
        for key in keys:
            assert math.isclose(row[f"train/{key}"], entry[key], rel_tol=1e-6)
    assert any(record.WhichOneof("record_type") == "exit" for record in records), "not closed"

    assert tensorboard_losses(tmp_path / "run") == [(e["step"], e["loss"]) for e in history]


def test_a_resumed_run_is_the_same_run_in_its_trackers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = trainer(tiny_model, tmp_path)
    flags = ("--logging_steps", "1", "--save_steps", "2", "--report_to", "wandb", "tensorboard")
    with pytest.raises(Stopped):
        run("run", *flags, "--max_minutes", "1e-6")
    output = run("run", *flags)
    ids = [
        {r.run.run_id for r in read_wandb(file) if r.WhichOneof("record_type") == "run"}
        for file in (output / "wandb").glob("offline-run-*/*.wandb")
    ]
    assert len(ids) == 2
    assert len(set.union(*ids)) == 1
    assert tensorboard_losses(output) == [(e["step"], e["loss"]) for e in log_of(output)]


@pytest.mark.slow
def test_a_failing_tracker_never_stops_training(tiny_model: Path, tmp_path: Path) -> None:
    # TensorBoard's folder is a file, and the wandb mode is unknown.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("")
    done = train(tiny_model, tmp_path, "tensorboard", "wandb", WANDB_MODE="nonsense")
    assert done.returncode == 0, done.stderr
    assert "tensorboard: " in done.stdout
    assert "wandb: " in done.stdout
    assert done.stdout.count("training continues without it") == 2
    assert len(log_of(tmp_path / "run")) == 3


@pytest.mark.slow
def test_trackers_are_closed_when_training_fails(broken_model: Path, tmp_path: Path) -> None:
    done = train(broken_model, tmp_path, "wandb")
    assert done.returncode == 1
    assert "error: step 3: 3 steps in a row" in done.stderr
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert any(record.WhichOneof("record_type") == "exit" for record in read_wandb(file))
