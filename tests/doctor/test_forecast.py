"""The doctor's forecast of steps, tokens, memory, disk and time agrees with training."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loop.config.flags import Config
from loop.distributed.layout import plan_layout
from loop.doctor import forecast
from loop.doctor.command import main
from loop.doctor.trial import Trial
from loop.inputs.training_data import read_training_data
from loop.inputs.windows import windows
from loop.training.optim import lr_at
from tests.doctor.test_doctor import Doctor, doctor, right
from tests.doctor.test_estimate import llama
from tests.support.helpers import ROOT, command, write_dialogues

__all__ = ["doctor", "right"]  # fixtures


def test_without_flags_the_main_job_is_examined_as_launch_sh_starts_it(
    chat_model: Path, tmp_path: Path
) -> None:
    # Another output folder: runs/main_job may hold a run.
    words = (sys.executable, "-m", "loop", "doctor", "--output_dir", tmp_path / "run")
    done = command(*words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    report = done.stdout
    assert "accelerate_configs/zero2.yaml: DeepSpeed ZeRO-2; 1 rank\n" in report
    assert "read 500 = kept 500" in report
    assert "8 examples = 1 rank x 4 micro-batches of at most 2 examples" in report
    assert "63 steps, 1.00 epochs" in report
    assert "134,515,008; trained 2,442,240 (1.783 %)" in report
    assert report.count("⟦") >= 3
    assert "\033" not in report
    assert report.splitlines()[-1] == "ready"
    page = (ROOT / "docs" / "training.md").read_text()
    (shown,) = (text for text in page.split("```") if text.startswith("text\nlaunch\n"))
    for line in shown.splitlines()[1:]:
        if not line.startswith(("  output  ", "  needed  ")):  # these depend on the folder
            assert line in report


def test_a_precision_that_the_output_folder_records_is_not_decided_anew(
    right: list[str | Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(word) for word in [*right, "--mixed_precision", "auto"]]
    main(words)
    assert "auto: decided when the run starts" in capsys.readouterr().out
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_config.yaml").write_text("mixed_precision: bf16\n")
    main(words)
    assert "bf16, by the run's settings" in capsys.readouterr().out


def test_only_a_terminal_gets_colours(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with pytest.raises(AssertionError):  # the last line has colours
        doctor()
    monkeypatch.delenv("FORCE_COLOR")
    assert doctor() == []


@pytest.mark.parametrize("packed", [True, False])
def test_forecast_tokens_and_micro_batches_are_those_of_the_windows(
    packed: bool, tiny_model: Path, tmp_path: Path
) -> None:
    texts = [["Hi", "Hello. " * (1 + 7 * n % 13)] for n in range(23)]
    data = write_dialogues(tmp_path / "data.json", *texts)
    config = Config(
        model_name_or_path=str(tiny_model),
        data_path=(str(data),),
        per_device_train_batch_size=2,
        global_batch_size=8,
        packing=packed,
    )
    prepared = read_training_data(config)
    layout = plan_layout(
        config, 23, SimpleNamespace(process_index=0, num_processes=2), prepared.base.packed
    )
    found = forecast.forecast_tokens(prepared, layout, config)
    collate = prepared.collator
    everything = [*windows(prepared.examples, layout, config.seed, collate)]
    other = plan_layout(
        config, 23, SimpleNamespace(process_index=1, num_processes=2), prepared.base.packed
    )
    theirs = [*windows(prepared.examples, other, config.seed, collate)]
    sizes = [
        # Keys and values of a shared prefix are kept for each segment.
        sum(map(sum, batch.model_inputs["row"].segments)) if packed else batch.tokens
        for window in everything + theirs
        for batch in window.micro_batches
    ]
    assert {size.tokens for size in found.sizes} == {*sizes}
    assert found.tokens == pytest.approx(sum(window.tokens for window in everything))
    supervised = sum(window.supervised_tokens for window in everything)
    assert found.supervised_share == pytest.approx(supervised / found.tokens)


def test_the_curve_is_the_learning_rate_of_each_step() -> None:
    config = Config(learning_rate=1.0, warmup_ratio=0.5)
    layout = plan_layout(config, 64, SimpleNamespace(process_index=0, num_processes=1))
    assert layout.total_steps == 24
    tokens = forecast.TokenForecast(1000.0, frozenset(), 0.5)
    *_, (name, text) = forecast.step_rows(layout, tokens, 64, config)
    top, *lines, axis = text.splitlines()
    assert (name, top) == ("learning rate", "cosine, 1.00e+00 at most, warm-up: 12 steps")
    heights = [sum(" ▁▂▃▄▅▆▇█".index(line[1 + step]) for line in lines) for step in range(24)]
    assert heights == [round(32 * lr_at(step, 24, config)) for step in range(24)]
    assert axis.split() == ["step", "1", "24"]


def test_time_is_the_tokens_over_the_trials_rate() -> None:
    config = Config()
    layout = plan_layout(config, 64, SimpleNamespace(process_index=0, num_processes=1))
    tokens = forecast.TokenForecast(90_000.0, frozenset(), 0.5)
    trial = Trial(startup=5.0, step=2.0, tokens_per_second=50.0, peak=2.0**30)
    rows = dict(forecast.time_rows(trial, layout, tokens, 2.0**29))
    assert rows["the run"].startswith("about 30 min 0 s, ")
    assert rows["peak memory"].endswith("estimated 0.50 GiB")


def test_a_trial_runs_the_launch_and_leaves_nothing(
    right: list[str | Path], tiny_model: Path, tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = command(
        *(sys.executable, "-m", "loop", "doctor", *right, "--trial"),
        *("--report_to", "tensorboard", "--load_best_model_at_end", "--eval_fraction", "0.3"),
        TMPDIR=str(temporary),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = done.stdout[done.stdout.index("\ntime\n") :]
    assert "tokens/s over all ranks" in report
    assert "GiB on rank 0" in report
    assert report.splitlines()[-1] == "ready"
    assert not (tmp_path / "run").exists()
    assert not [*temporary.glob("lora-loop-trial-*")]


def test_a_trial_without_weights_or_with_failing_training_reports_the_cause(
    broken_model: Path, doctor: Doctor, tiny_model: Path, tmp_path: Path
) -> None:
    (bare,) = doctor("--trial", "--model_name_or_path", without_weights(tiny_model, tmp_path))
    assert "--trial: found no weights in" in bare
    (failed,) = doctor("--trial", "--model_name_or_path", broken_model)
    assert "--trial: training ended with exit code 1: step 3: 3 steps in a row" in failed


def without_weights(model: Path, folder: Path) -> Path:
    """Return a copy of a model's folder, without its weights."""
    bare = folder / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    return bare


def test_no_weights_are_needed(doctor: Doctor, tiny_model: Path, tmp_path: Path) -> None:
    assert doctor("--model_name_or_path", without_weights(tiny_model, tmp_path)) == []


def test_the_state_of_the_output_folder_is_reported(
    doctor: Doctor, right: list[str | Path], tmp_path: Path
) -> None:
    words = [str(word) for word in right[:-2]]
    done = command(
        *(sys.executable, "loop/train.py", *words, "--max_steps", "4", "--save_steps", "2"),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr
    four = ("--max_steps", "4", "--save_steps", "2")
    before = sorted(tmp_path.rglob("*"))
    assert "holds this run, finished; resumes from checkpoint-4" in output(doctor, *four)
    (found,) = doctor(*four, "--lora_r", "4")
    assert "other data or settings: --lora_r was 8, is 4" in found
    assert doctor(*four, "--lora_r", "4", "--resume_from_checkpoint", "False") == []
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "run" / "trainer_state.json").unlink()
    assert "run: exists; resumes from checkpoint-4" in output(doctor, *four)


def test_a_new_folder_is_new_even_if_the_named_checkpoint_is_missing(
    doctor: Doctor, right: list[str | Path], tmp_path: Path
) -> None:
    words = [*right, "--resume_from_checkpoint", tmp_path / "no"]
    done = command(sys.executable, "-m", "loop", "doctor", *words, OMP_NUM_THREADS="1")
    assert "found no checkpoint; expected a folder" in done.stderr
    assert "run: new; no checkpoint to resume from: see below" in " ".join(done.stdout.split())


def output(doctor: Doctor, *flags: str) -> str:
    """Return the report's line about the output folder."""
    found: list[str] = []
    original = forecast.disk_rows

    def keep(*values: Any) -> Any:
        rows, errors = original(*values)
        found.extend(text for _, text in rows)
        return rows, errors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "disk_rows", keep)
        assert doctor(*flags) == []
    return found[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "no login: kept offline"),
        ({"WANDB_API_KEY": "x" * 40}, "found a login"),
        ({"WANDB_MODE": "offline"}, "WANDB_MODE is offline"),
    ],
)
def test_the_login_of_wandb_is_reported(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ((kind, text),) = forecast.tracker_rows(Config(report_to=("wandb",)))
    assert kind == "wandb"
    assert text.startswith(expected)


def test_the_command_needs_a_config_json_only(tmp_path: Path) -> None:
    done = command(
        sys.executable, "-m", "loop", "doctor", "--estimate",
        "--model_name_or_path", llama(tmp_path / "m"),
        "--accelerate_config", "accelerate_configs/zero3.yaml",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "zero3, LoRA, bf16, rank of 8" in done.stdout
    assert "peak, allocated" in done.stdout
