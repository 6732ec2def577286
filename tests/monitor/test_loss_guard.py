"""A step with a non-finite loss or gradient is skipped and reported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import RunError
from loop import train as training
from loop.checkpoint.storage import list_folders
from tests.checkpoint.test_storage import cut_off, same
from tests.support.helpers import adapter_of, command, launch, log_of, write_dialogues

Train = Callable[..., Path]
FLAGS = ("--max_steps", "6", "--lr_scheduler_type", "constant", "--seed", "1")


def broken_at(*steps: int, monkeypatch: pytest.MonkeyPatch, grow: float = float("nan")) -> None:
    """Multiply the losses of these steps (from 1) by `grow`; a step must have one micro-batch."""
    loss_sum, calls = training.supervised_loss_sum, []

    def broken(*arguments: Any) -> Any:
        calls.append(1)
        return loss_sum(*arguments) * (grow if len(calls) in steps else 1.0)

    monkeypatch.setattr(training, "supervised_loss_sum", broken)


@pytest.mark.parametrize("grow", [float("nan"), float("inf")])
def test_a_non_finite_step_is_skipped_and_its_examples_are_printed(
    grow: float, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Every step has the same dialogue, so a run that skips one step equals a shorter run.
    one = ("--num_data", "1", *FLAGS, "--logging_steps", "2", "--lora_dropout", "0")
    shorter = train("shorter", *one, "--max_steps", "5")
    broken_at(3, monkeypatch=monkeypatch, grow=grow)
    run = train("run", *one)
    assert same(run, shorter)
    output = capsys.readouterr().out
    assert output.count("step 3: the loss or the gradient is not finite; the step is skipped.") == 1
    assert "Examples: d" in output
    log, expected = log_of(run), log_of(shorter)
    assert [(entry["step"], entry["bad_steps"]) for entry in log] == [
        (1, 0),
        (2, 0),
        (4, 1),
        (6, 0),
    ]
    # The entry after step 4 has the loss of step 4 only, the third step of the shorter run.
    assert [e["loss"] for e in log][:2] == [e["loss"] for e in expected][:2]
    # The shorter run logs the mean of its third and fourth step.
    fourth = 2 * expected[2]["loss"] - log[2]["loss"]
    assert (fourth + expected[3]["loss"]) / 2 == pytest.approx(log[3]["loss"], rel=1e-5)


def test_too_many_non_finite_steps_in_a_row_end_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--max_nonfinite_steps", "2", "--save_steps", "1")
    with monkeypatch.context() as patch:
        broken_at(2, 4, monkeypatch=patch)
        train("apart", *flags)
        assert len(log_of(tmp_path / "apart")) == 2
    broken_at(4, 5, monkeypatch=monkeypatch)
    with pytest.raises(RunError, match="step 5: 2 steps in a row"):
        train("run", *flags)
    assert list_folders(tmp_path / "run")[0].name == "checkpoint-4"


def test_the_count_of_non_finite_steps_survives_a_kill(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = (*FLAGS, "--save_steps", "2", "--logging_steps", "6")
    with monkeypatch.context() as patch:
        broken_at(2, monkeypatch=patch)
        train("run", *flags)
    cut_off(tmp_path / "run", after=2)
    progress = json.loads((tmp_path / "run/checkpoint-2/progress.json").read_text())
    assert (progress["bad_in_a_row"], progress["interval"]["counts"]["bad_steps"]) == (1, 1)
    broken_at(1, monkeypatch=monkeypatch)  # step 1 of this process is step 3 of the run
    with pytest.raises(RunError, match="step 3: 2 steps in a row"):
        train("run", *flags, "--max_nonfinite_steps", "2")


BROKEN = """
import sys
sys.path.insert(0, {root!r})
import torch
from loop import train
from loop.distributed.signals import run_and_exit
loss_sum, calls = train.supervised_loss_sum, []
def broken(*arguments):
    calls.append(1)
    rank = torch.distributed.get_rank()
    bad = len(calls) == 3 and rank == 1
    return loss_sum(*arguments) * (float("nan") if bad else 1.0)
train.supervised_loss_sum = broken
run_and_exit(train.main)
"""


@pytest.mark.parametrize(
    "config",
    ["ddp", "zero2", *[pytest.param(c, marks=pytest.mark.slow) for c in ("zero1", "zero3")]],
)
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_non_finite_step_on_one_rank_is_skipped_on_all(
    config: str, precision: str, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo there"], ["Hi", "Yo there"])
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(root=str(Path(__file__).resolve().parents[2])))
    flags: list[str | Path] = ["--model_name_or_path", tiny_model, "--data_path", data]
    flags += ["--mixed_precision", precision, "--learning_rate", "1e-2", "--lora_dropout", "0"]
    flags += ["--global_batch_size", "2", "--lr_scheduler_type", "constant", "--logging_steps", "1"]
    more: dict[str, Any] = {"processes": 2, "script": str(script)}
    log = launch(config, tmp_path / "run", *flags, "--max_steps", "5", **more)
    launch(config, tmp_path / "shorter", *flags, "--max_steps", "4", processes=2)
    assert [entry["bad_steps"] for entry in log] == [0, 0, 1, 0, 0]
    assert (log[2]["loss"], log[2]["grad_norm"]) == (None, None)
    run, shorter = adapter_of(tmp_path / "run"), adapter_of(tmp_path / "shorter")
    for name, tensor in shorter.items():
        assert torch.equal(run[name], tensor), name


def test_mfu_follows_the_documented_formula(tiny_model: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo there"], ["And?", "So it is."])
    done = command(
        "python", "loop/train.py", "--model_name_or_path", tiny_model, "--data_path", data,
        "--output_dir", tmp_path / "run", "--max_steps", "2", "--logging_steps", "1",
        "--peak_tflops", "0.5", "--mixed_precision", "no",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entry = log_of(tmp_path / "run")[-1]
    # Two layers: hidden 64, 4 heads of 16, 2 key-value heads, MLP 128; 1,000 tokens.
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    norms = 5 * 64
    lora = 2 * 8 * (64 + 64 + 64 + 32)
    seconds = 1 / entry["padded_tokens_per_second"]  # per computed token
    tokens = entry["mfu"] * 0.5e12 * seconds
    supervised = entry["supervised_tokens_per_second"] / entry["padded_tokens_per_second"]
    known = 4 * (2 * layer + norms) + 6 * lora + 4 * 64_000 * supervised
    attention = tokens - known
    # Two layers of width 64 have 6 x 128 x length; the lengths are some tens of tokens.
    assert 6 * 128 * 10 < attention < 6 * 128 * 60
    shares = f"prefix-shared {entry['shared_share']:.0%}  MFU {entry['mfu']:.1%}"
    assert f"  padding 0%  {shares}  " in done.stdout
