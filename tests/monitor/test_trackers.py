"""Trackers get tags, summary, samples and the adapter; trackio has every step once."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from data.errors import Stopped, UserError
from loop.config import load, preflight
from loop.config.flags import Config
from loop.distributed.layout import Layout
from loop.monitor.history import PriorRun
from loop.monitor.trackers import Trackers, summary
from tests.conftest import trainer
from tests.monitor.test_logger import read_wandb
from tests.support.helpers import ROOT, command, log_of, wait_until, write_dialogues

ROWS = [
    {"prompt": "Who are you?", "answer": "I'm | <b>Vireo</b>,\nwith `code`."},
    {"prompt": "And?", "answer": "So."},
]
HISTORY: list[dict[str, Any]] = [
    {"step": 1, "loss": 3.0, "grad_norm": None, "supervised_tokens": 70, "seconds": 1.5},
    {"step": 2, "loss": 1.0, "supervised_tokens": 140, "seconds": 2.5, "resumed_from": 1},
    {"step": 2, "eval_loss": 2.5, "eval_loss_by_source": {"/a": 2.0, "b": 3.0}},
    {"step": 3, "loss": 2.0, "supervised_tokens": 210, "seconds": 4.0},
]


def trackers(folder: Path, *kinds: Any, **more: Any) -> Trackers:
    """Return opened trackers of a run of three steps."""
    PartialState(cpu=True)
    folder.mkdir(exist_ok=True)
    config = Config(output_dir=str(folder), report_to=kinds, **more)
    made = Trackers(config, Layout(0, 1, 2, 1, 2, 1, 3), PriorRun(0, {}))
    made.open()
    assert {*made.opened} == {*kinds}
    return made


def records(folder: Path, kind: str) -> list[Any]:
    """Wait until wandb's only file is complete, and return its records of one kind.

    wandb writes in a separate process, which may end shortly after the run.
    """
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    found: list[tuple[str, Any]] = []

    def is_complete() -> bool:
        found[:] = [(record.WhichOneof("record_type"), record) for record in read_wandb(file)]
        return "exit" in dict(found)

    wait_until(is_complete)
    return [getattr(record, kind) for name, record in found if name == kind]


def exit_codes(folder: Path) -> list[int]:
    """Return the exit codes in wandb's file."""
    return [record.exit_code for record in records(folder, "exit")]


def values(folder: Path) -> dict[str, Any]:
    """Return wandb's final summary."""
    found: dict[str, Any] = {}
    for record in records(folder, "summary"):
        found |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.update}
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))


def test_wandb_holds_tags_summary_and_samples(tmp_path: Path) -> None:
    made = trackers(tmp_path, "wandb", tags=("t5", "first try"))
    for entry in HISTORY:
        made.log(entry)
    made.log_samples(3, ROWS)
    made.finish(HISTORY, failed=False)
    assert [*records(tmp_path, "run")[0].tags] == ["t5", "first try"]
    assert exit_codes(tmp_path) == [0]
    found = values(tmp_path)
    expected = {"final_loss": 2.0, "best_loss": 1.0, "best_loss_step": 2, "seconds": 4.0}
    expected |= {"final_eval_loss": 2.5, "best_eval_loss": 2.5, "supervised_tokens": 210}
    expected |= {
        "eval/loss": 2.5,
        "eval/loss_by_source/a": 2.0,
        "eval/loss_by_source/b": 3.0,
        "train/loss": 2.0,
    }
    assert {key: found[key] for key in expected} == expected
    assert not {"train/resumed_from", "train/step", "train/grad_norm"} & {*found}
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.table.json")
    shown = json.loads(table.read_text())
    assert shown["columns"] == ["prompt", "answer"]
    assert shown["data"] == [[*row.values()] for row in ROWS]


def test_wandb_marks_a_failed_run_as_failed(tmp_path: Path) -> None:
    made = trackers(tmp_path, "wandb", wandb_artifact=True)
    made.finish([], failed=True)
    assert exit_codes(tmp_path) == [1]


def test_the_adapter_is_uploaded_to_wandb_only_if_set(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = trainer(tiny_model, tmp_path)
    without = run("without", "--report_to", "wandb")
    assert not records(without, "artifact")
    output = run("run", "--report_to", "wandb", "--wandb_artifact", "True", "--run_name", "a b/c")
    (artifact,) = records(output, "artifact")
    assert (artifact.name, artifact.type) == ("a-b-c-adapter", "model")
    contents = {entry.path: entry.size for entry in artifact.manifest.contents}
    names = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert {*contents} >= names | {"training_config.yaml"}
    assert all(contents[name] == (output / name).stat().st_size for name in names)
    assert not [name for name in contents if "checkpoint" in name or "wandb" in name]
    assert exit_codes(output) == [0]
    assert "artifact" not in "".join(capfd.readouterr())


def test_tensorboard_shows_samples_as_a_table_with_escaped_markup(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trackers(tmp_path, "tensorboard")
    made.log_samples(3, ROWS)
    made.finish(HISTORY, failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name))
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert event.step == 3
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    assert lines[:2] == ["| prompt | answer |", "| --- | --- |"]
    assert lines[2] == (
        "| Who are you? | I&#x27;m \\| &lt;b&gt;Vireo&lt;/b&gt;,<br>with \\`code\\`. |"
    )
    assert len(lines) == 4


def scripted(folder: Path, kind: str, lines: str, **env: str) -> str:
    """Run lines of Python in a process with this environment; `made` are its trackers."""
    script = folder / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\n"
        "from tests.monitor.test_trackers import HISTORY, ROWS, trackers\n"
        f"made = trackers(Path({str(folder / 'run')!r}), {kind!r})\n{lines}\n"
    )
    done = command("python", script, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_a_network_the_wandb_run_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    lines = "made.log(HISTORY[0]); made.finish(HISTORY, failed=False)"
    output = scripted(tmp_path, "wandb", lines, WANDB_INIT_TIMEOUT="1", **nowhere)
    assert "wandb: server not reached (" in output
    assert values(tmp_path / "run")["train/loss"] == 3.0


def trackio_rows(folder: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """Return the rows of trackio's database: run id, step, metrics."""
    with sqlite3.connect(folder / "lora-loop.db") as database:
        found = database.execute("select run_id, step, metrics from metrics order by id")
        return [(run, step, json.loads(text)) for run, step, text in found]


def test_trackio_holds_every_logged_step_once_after_a_stop_and_resume(
    tiny_model: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Hello there."], ["And?", "So."])
    flags: list[str | Path] = ["--model_name_or_path", tiny_model, "--data_path", data]
    flags += ["--output_dir", tmp_path / "run", "--max_steps", "4", "--logging_steps", "1"]
    flags += ["--report_to", "trackio", "--save_steps", "1"]
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    stopped = command("python", "loop/train.py", *flags, "--max_minutes", "1e-6", **env)
    assert stopped.returncode == 75, stopped.stderr
    # As if the run had been killed one step later, before the next checkpoint.
    ((run, _, _),) = trackio_rows(tmp_path / "trackio")
    with sqlite3.connect(tmp_path / "trackio/lora-loop.db") as database:
        database.execute(
            "insert into metrics (run_id, timestamp, run_name, step, metrics, log_id) "
            "select run_id, timestamp, run_name, 2, metrics, 'x' from metrics"
        )
    done = command("python", "loop/train.py", *flags, **env)
    assert done.returncode == 0, done.stderr
    assert "Run finished" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("cost:")
    rows = trackio_rows(tmp_path / "trackio")
    history = log_of(tmp_path / "run")
    assert [step for _, step, _ in rows] == [1, 2, 3, 4]
    assert {name for name, _, _ in rows} == {run}
    for (_, _, shown), entry in [*zip(rows, history, strict=True)][2:]:
        for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
            assert shown[f"train/{key}"] == pytest.approx(entry[key], rel=1e-6)
    with sqlite3.connect(tmp_path / "trackio/lora-loop.db") as database:
        (config,) = database.execute("select config from configs").fetchone()
    assert json.loads(config)["lora_r"] == 8
    assert [entry.get("resumed_from") for entry in history] == [None, 1, None, None]


def test_trackio_shows_samples_as_a_table(tmp_path: Path) -> None:
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    lines = "made.log_samples(3, ROWS); made.finish([], failed=False)"
    scripted(tmp_path, "trackio", lines, **env)
    ((_, step, found),) = trackio_rows(tmp_path / "trackio")
    assert (step, found["samples"]["_value"]) == (3, ROWS)


def test_the_summary_of_a_run_that_logged_nothing_is_empty() -> None:
    assert summary([]) == {}
    assert summary([{"step": 1, "loss": None}]) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--wandb_artifact",), "found no wandb in --report_to"),
        (("--tags", "x" * 65), "expected 1 to 64 characters"),
    ],
)
def test_wrong_tracker_flags_are_refused_before_the_run(
    flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load.read_config(flags, Config)


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preflight, "version", lambda name: None if name == "trackio" else "1.0")
    (found,) = preflight.missing(Config(report_to=("trackio", "wandb")), None)
    assert "--report_to trackio: the package trackio is not installed" in found
    assert "pip install trackio" in found


def test_wandb_does_not_mark_a_stopped_run_as_failed(tiny_model: Path, tmp_path: Path) -> None:
    run = trainer(tiny_model, tmp_path)
    with pytest.raises(Stopped):
        run("run", "--report_to", "wandb", "--max_minutes", "1e-6")
    assert exit_codes(tmp_path / "run") == [0]
