"""A run ends with five lines whose commands work."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import Stopped
from loop.checkpoint.saver import TIME_IS_OVER, Saver
from loop.checkpoint.storage import newest_checkpoint
from loop.config.flags import Config
from loop.config.load import read_config
from loop.monitor.summary import Spent, summary
from tests.support.helpers import log_of

Train = Callable[..., Path]
SPENT = Spent(3723.4, 5_000_000, 1_234_567, 8, on_gpus=True)


def lines_of(text: str) -> dict[str, str]:
    """Return the last five lines of the output, by their names."""
    lines = text.strip().splitlines()[-5:]
    named = {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}
    assert [*named] == ["result", "saved", "use", "resume", "cost"]
    return named


def summary_of(
    tmp_path: Path, *flags: str, history: list[dict[str, Any]], step: int, stopped: bool = False
) -> dict[str, str]:
    words = ["--model_name_or_path", "x", "--output_dir", str(tmp_path), *flags]
    config = read_config(words, Config)
    return lines_of(summary(config, history, step, 40, SPENT, stopped, newest_checkpoint(tmp_path)))


def test_a_run_ends_with_result_saved_use_resume_and_cost(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    output = train("run", "--logging_steps", "2")
    lines = lines_of(capsys.readouterr().out)
    history = log_of(output)
    first, last = history[0], history[-1]
    steps = f"loss {first['loss']:.4f} (step 1) -> {last['loss']:.4f} (steps 3 to 4)"
    assert lines["result"] == f"4 of 4 steps; {steps}"
    assert lines["saved"] == f"{output / 'adapter_model.safetensors'}, reloaded and checked"
    assert lines["use"] == f"python -m loop chat --adapter {shlex.quote(str(output))}"
    assert f"{last['supervised_tokens']:,} of them supervised" in lines["cost"]
    assert "core-hours; " in lines["cost"]


def test_a_finished_run_trains_longer_with_the_printed_flags(
    train: Train, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train("run")
    line = lines_of(capsys.readouterr().out)["resume"]
    assert (
        "from checkpoint-4, repeat the command with --allow_resume_mismatch --max_steps 8" in line
    )
    train("run", *line.partition(" with ")[2].split())
    text = capsys.readouterr().out
    assert "checkpoint-4, after step 4 of 8" in text
    assert lines_of(text)["result"].startswith("8 of 8 steps")
    without = train("without", "--save_strategy", "no")
    line = lines_of(capsys.readouterr().out)["resume"]
    assert line.startswith("no checkpoint was kept")
    words = line.partition(" with ")[2].split()
    assert words == ["--lora_weight_path", str(without)]
    train("next", *words)
    assert log_of(tmp_path / "next")[0]["loss"] < log_of(without)[0]["loss"]


def test_a_stopped_run_prints_how_to_resume_and_then_counts_both_parts(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    once = train("once", "--logging_steps", "1")
    uninterrupted = lines_of(capsys.readouterr().out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "_wanted", lambda self: self._request(TIME_IS_OVER))
        with pytest.raises(Stopped):
            train("run", "--logging_steps", "1")
    lines = lines_of(capsys.readouterr().out)
    output = once.parent / "run"
    assert lines["result"].startswith("1 of 4 steps; loss ")
    assert lines["saved"].startswith(
        f"{output / 'checkpoint-1'}, complete; the run is not finished"
    )
    assert lines["use"].startswith("once the run is finished: ")
    assert lines["resume"] == "the same command resumes from this checkpoint"
    train("run", "--logging_steps", "1")
    lines = lines_of(capsys.readouterr().out)
    assert lines["result"] == uninterrupted["result"]
    assert lines["cost"].partition("; ")[2] == uninterrupted["cost"].partition("; ")[2]


def test_the_result_has_the_last_and_lowest_eval_loss_and_which_is_saved(tmp_path: Path) -> None:
    history: list[dict[str, Any]] = [{"step": 1, "loss": 3.0}, {"step": 20, "loss": None}]
    history += [{"step": 20, "eval_loss": 1.5}, {"step": 40, "loss": 1.25}]
    history += [{"step": 40, "eval_loss": 1.625}]
    result = summary_of(tmp_path, history=history, step=40)["result"]
    losses = "40 of 40 steps; loss 3.0000 (step 1) -> 1.2500 (steps 21 to 40)"
    assert result == f"{losses}; eval loss 1.6250, lowest 1.5000 (step 20)"
    flags = ("--load_best_model_at_end", "--eval_fraction", "0.1")
    result = summary_of(tmp_path, *flags, history=history, step=40)["result"]
    assert result.endswith("lowest 1.5000 (step 20), which is saved")
    result = summary_of(tmp_path, history=history[:2], step=20)["result"]
    assert result.endswith("-> not finite (steps 2 to 20)")


def test_the_cost_has_time_device_hours_and_price(tmp_path: Path) -> None:
    history = [{"step": 1, "loss": 3.0}]
    cost = summary_of(tmp_path, history=history, step=40)["cost"]
    tokens = "5,000,000 tokens, 1,234,567 of them supervised"
    assert cost == f"1 h 2 min, 8.274 GPU-hours; {tokens}"
    cost = summary_of(tmp_path, "--cost_per_hour", "2.5", history=history, step=40)["cost"]
    assert cost == f"1 h 2 min, 8.274 GPU-hours (20.69 at 2.5 an hour); {tokens}"


def test_the_resume_flags_depend_on_how_the_run_ended_and_started(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    history = [{"step": 1, "loss": 3.0}]
    flags = ("--early_stopping_patience", "2", "--eval_fraction", "0.1")
    line = summary_of(tmp_path, *flags, history=history, step=20)["resume"]
    assert line.endswith("with --allow_resume_mismatch --early_stopping_patience 4")
    line = summary_of(tmp_path, history=history, step=40)["resume"]
    assert "from checkpoint-20, repeat the command with --allow_resume_mismatch" in line
    assert line.endswith("--num_train_epochs 6")
    flags = ("--resume_from_checkpoint", "False")
    line = summary_of(tmp_path, *flags, history=history, step=20, stopped=True)["resume"]
    assert (
        line == "the same command, without --resume_from_checkpoint, resumes from this checkpoint"
    )
