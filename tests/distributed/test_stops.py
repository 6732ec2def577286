"""A run that is asked to stop ends after the step, with a checkpoint, by 75; never hanging."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.errors import RunError, Stopped
from loop import train as training
from loop.checkpoint import storage
from loop.checkpoint.saver import ASKED, GO_ON, SIGNAL, Request, agreed_reason
from loop.checkpoint.storage import list_folders, verify
from tests.checkpoint.test_storage import same
from tests.support.helpers import (
    ROOT,
    adapter_of,
    command,
    log_of,
    start,
    wait_until,
    write_dialogues,
)

Train = Callable[..., Path]
SIX = ("--max_steps", "6", "--lora_dropout", "0.3", "--logging_steps", "1")


def at_step(step: int, action: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something done in the middle of a step."""
    loss_sum, calls = training.supervised_loss_sum, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == step:
            action()
        return loss_sum(*arguments)

    monkeypatch.setattr(training, "supervised_loss_sum", interrupted)


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 1), (signal.SIGINT, 2), (signal.SIGUSR1, 5)]
)
def test_a_signal_is_answered_after_the_step_and_the_run_can_go_on(
    number: signal.Signals, step: int, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reference = train("reference", *SIX)
    before = signal.getsignal(number)
    at_step(step, lambda: os.kill(os.getpid(), number), monkeypatch)
    with pytest.raises(Stopped, match=rf"{number.name} was received; checkpoint-{step} is saved"):
        train("run", *SIX)
    assert signal.getsignal(number) == before
    assert Stopped.exit_code == 75
    assert same(train("run", *SIX), reference)
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [*range(1, 7)]


def test_a_request_during_a_save_is_answered_after_the_next_step(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, asked = storage.write, threading.Event()

    def interrupted(*arguments: Any) -> None:
        if not asked.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            asked.set()
        write(*arguments)

    monkeypatch.setattr(storage, "write", interrupted)
    at_step(3, asked.wait, monkeypatch)
    with pytest.raises(Stopped, match="checkpoint-3 is saved"):
        train("run", *SIX, "--save_steps", "2")
    assert same(train("run", *SIX, "--save_steps", "2"), train("reference", *SIX))


def test_a_second_interrupt_stops_at_once(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(2, twice, monkeypatch)
    with pytest.raises(RunError, match="interrupted twice"):
        train("run", *SIX)


def test_a_file_named_stop_is_a_request(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    at_step(3, (tmp_path / "run/STOP").touch, monkeypatch)
    with pytest.raises(Stopped, match="STOP; checkpoint-3 is saved"):
        train("run", *SIX)
    # The same command takes it away and goes on.
    assert len(log_of(train("run", *SIX))) == 6
    assert not (tmp_path / "run/STOP").exists()


def test_after_max_minutes_it_stops_though_nothing_else_is_saved(
    train: Train, tmp_path: Path
) -> None:
    flags = (*SIX, "--save_strategy", "no")
    with pytest.raises(Stopped, match="--max_minutes 1e-06 are over; checkpoint-1"):
        train("run", *flags, "--max_minutes", "1e-6")
    assert [folder.name for folder in list_folders(tmp_path / "run")] == ["checkpoint-1"]
    assert same(train("run", *flags), train("reference", *flags))


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path) -> list[str | Path]:
    texts = [["Hi " * 9 * n, "Yo " * 9] for n in range(1, 9)]
    data = write_dialogues(tmp_path / "data.json", *texts)
    return [
        *("--model_name_or_path", tiny_model, "--data_path", data, "--mixed_precision", "no"),
        *("--output_dir", tmp_path / "run", "--logging_steps", "1", "--save_steps", "10000"),
    ]


@pytest.fixture
def launched(flags: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Start ./launch.sh on two ranks."""
    monkeypatch.setenv("NUM_PROCESSES", "2")

    def run(*more: str | Path) -> Any:
        words = [ROOT / "launch.sh", "accelerate_configs/zero2.yaml", *flags, *more]
        return start(*words, log=tmp_path / "log")

    return run


def wait_for(text: str, log: Path, launched: Any) -> None:
    wait_until(lambda: log.exists() and text in log.read_text(), lambda: launched.poll() is None)


def test_launch_sh_passes_a_request_on_and_goes_on_when_run_again(
    launched: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    first = launched("--max_steps", "100000")
    wait_for("step     10/", log, first)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 75, log.read_text()
    text = log.read_text()
    assert text.count("stopped: SIGTERM was received; checkpoint-") == 1
    assert "Traceback" not in text
    (folder,) = list_folders(tmp_path / "run")
    step = verify(folder).step
    second = launched("--max_steps", "100000", "--max_minutes", "1e-6", "--allow_resume_mismatch")
    assert second.wait() == 75, log.read_text()
    assert verify(list_folders(tmp_path / "run")[0]).step == step + 1
    assert [entry["step"] for entry in entries(tmp_path / "run")] == [*range(1, step + 2)]


def entries(output: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_request_while_data_is_prepared_ends_it_at_once(launched: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = launched("--max_steps", "100000")
    wait_for("+ accelerate launch", log, run)
    run.send_signal(signal.SIGUSR1)
    assert run.wait() == 75, log.read_text()
    assert not list_folders(tmp_path / "run")


@pytest.mark.slow
def test_until_done_goes_on_after_crashes_and_stops(launched: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    steps = ("--max_steps", "100000", "--save_steps", "20")
    run = launched(*steps, "--until-done")
    wait_for("step     30/", log, run)
    for process in psutil.process_iter(["cmdline"]):
        # A rank, by the file it is run from and the folder it writes to.
        words = process.info["cmdline"] or []
        if "-u" in words and str(tmp_path / "run") in words:
            process.kill()
            break
    wait_for("going on", log, run)
    wait_for("resume: ", log, run)
    wait_for("step     60/", log, run)  # Farther than the launch that was killed.
    (tmp_path / "run/STOP").touch()
    assert run.wait() == 75, log.read_text()
    assert len(entries(tmp_path / "run")) > 30
    assert adapter_of(list_folders(tmp_path / "run")[0])


@pytest.mark.parametrize("asked", ["launcher", "signal"])
def test_the_reason_is_that_of_the_rank_that_saw_the_request(
    asked: str, flags: list[str | Path], tmp_path: Path
) -> None:
    """The first rank, which prints the message, sees nothing itself."""
    status = tmp_path / "status"
    done = command(
        *("accelerate", "launch", "--config_file", "accelerate_configs/zero2.yaml"),
        *("--num_processes", "2", "--main_process_port", "0", "tests/support/asked_train.py"),
        *(*flags, "--max_steps", "6"),
        ASKED=asked,
        LORA_LOOP_STATUS_FILE=str(status),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reason = "SIGTERM was received; checkpoint-3 is saved; "
    assert done.stderr.count("stopped: ") == done.stderr.count(f"stopped: {reason}") == 1
    assert "machine" not in done.stderr
    assert status.read_text().startswith(f"75 {reason}")


def test_every_rank_words_the_reason_alike_and_names_the_machine_if_there_are_several() -> None:
    def ranks(*kinds: int, machines: str) -> list[Request]:
        return [
            Request(kind, f"reason of {rank}", int(machine), f"node{machine}")
            for rank, (kind, machine) in enumerate(zip(kinds, machines, strict=True))
        ]

    none, signal, asked = GO_ON, SIGNAL, ASKED
    assert agreed_reason(ranks(none, asked, machines="00"), asked) == "reason of 1"
    assert agreed_reason(ranks(signal, none, asked, asked, machines="0000"), asked) == "reason of 2"
    two = ranks(none, signal, none, signal, machines="0022")
    assert agreed_reason(two, signal) == "on machine node0: reason of 1"
    # By this word launch.sh of the other machine knows not to start again: --until-done.
    two = ranks(none, signal, asked, asked, machines="0022")
    assert agreed_reason(two, asked) == "STOP on machine node2: reason of 2"
