"""A stop request ends a run after the current step, with a checkpoint and exit code 75."""

import os
import signal
import subprocess
import sys
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
from loop.distributed import signals
from tests.checkpoint.test_storage import same
from tests.support.helpers import (
    HANG,
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
    """Run `action` in the middle of a step."""
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
def test_a_signal_stops_the_run_after_the_step_and_the_run_resumes(
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


def test_a_request_during_a_save_stops_the_run_after_the_next_step(
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


def test_a_second_interrupt_stops_the_run_at_once(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(2, twice, monkeypatch)
    with pytest.raises(RunError, match="interrupted twice"):
        train("run", *SIX)


def test_a_file_named_stop_stops_the_run_and_the_same_command_removes_it(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    at_step(3, (tmp_path / "run/STOP").touch, monkeypatch)
    with pytest.raises(Stopped, match="STOP; checkpoint-3 is saved"):
        train("run", *SIX)
    # The same command removes the file and resumes.
    assert len(log_of(train("run", *SIX))) == 6
    assert not (tmp_path / "run/STOP").exists()


def test_max_minutes_saves_a_checkpoint_although_save_strategy_is_no(
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


def test_launch_sh_passes_a_request_to_the_ranks_and_the_same_command_resumes(
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
def test_a_request_before_the_loop_ends_the_run_without_a_checkpoint(
    launched: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    run = launched("--max_steps", "100000")
    wait_for("+ accelerate launch", log, run)
    run.send_signal(signal.SIGUSR1)
    assert run.wait() == 75, log.read_text()
    assert not list_folders(tmp_path / "run")


@pytest.mark.slow
def test_until_done_runs_again_after_a_crash_and_ends_after_a_stop_file(
    launched: Any, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    steps = ("--max_steps", "100000", "--save_steps", "20")
    run = launched(*steps, "--until-done")
    wait_for("step     30/", log, run)
    for process in psutil.process_iter(["cmdline"]):
        # A rank, recognized by its -u and its output folder.
        words = process.info["cmdline"] or []
        if "-u" in words and str(tmp_path / "run") in words:
            process.kill()
            break
    wait_for("starting again", log, run)
    wait_for("resume: ", log, run)
    wait_for("step     60/", log, run)  # The killed launch had not reached this step.
    (tmp_path / "run/STOP").touch()
    assert run.wait() == 75, log.read_text()
    assert len(entries(tmp_path / "run")) > 30
    assert adapter_of(list_folders(tmp_path / "run")[0])


@pytest.mark.parametrize("asked", ["launcher", "signal"])
def test_the_reason_is_that_of_the_rank_that_saw_the_request(
    asked: str, flags: list[str | Path], tmp_path: Path
) -> None:
    """Rank 0, which prints the message, sees no request itself."""
    status = tmp_path / "status"
    status.touch()
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


def test_all_ranks_have_the_same_reason_and_name_the_machine_if_there_are_several() -> None:
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
    # launch.sh on the other machine searches for STOP, so --until-done ends there, too.
    two = ranks(none, signal, asked, asked, machines="0022")
    assert agreed_reason(two, asked) == "STOP on machine node2: reason of 2"


def test_a_reader_of_the_status_file_never_sees_a_part_of_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.touch()
    monkeypatch.setenv(signals.STATUS_FILE, str(status))
    with status.open() as opened_before:
        signals._write_status(2, "a reason")
        assert opened_before.read() == ""  # The file was replaced, not written to.
    assert status.read_text() == "2 a reason\n"
    assert [*tmp_path.iterdir()] == [status]


def rank_process(code: str, status: Path, rank: int = 0) -> subprocess.Popen[bytes]:
    """Start Python code with the environment of one of two ranks of `accelerate launch`."""
    variables = {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2", "RANK": str(rank)}
    variables |= {"LOCAL_RANK": str(rank), signals.STATUS_FILE: str(status)}
    words = [sys.executable, "-c", code]
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, **variables})


# While a signal is blocked, as in a collective, Python cannot run its handler.
STUCK = """
import signal, time
from loop.distributed import signals

def main():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    time.sleep(600)

signals.GRACE_SECONDS = 0.1
signals.run_and_exit(main)
"""


@pytest.mark.parametrize(
    ("rank", "before", "after"), [(0, "", "75 \n"), (1, "", ""), (0, "0 \n", "0 \n")]
)
def test_a_first_rank_that_is_stuck_writes_75_before_it_kills_itself(
    rank: int, before: str, after: str, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text(before)
    (tmp_path / f"status{signals.STOP_SUFFIX}").touch()
    assert rank_process(STUCK, status, rank).wait(timeout=HANG) == 75
    assert status.read_text() == after


def test_a_status_file_that_launch_sh_removed_is_not_created_again(tmp_path: Path) -> None:
    code = "from loop.distributed.signals import run_and_exit\nrun_and_exit(lambda: None)"
    assert rank_process(code, tmp_path / "status").wait(timeout=HANG) == 0
    assert not [*tmp_path.iterdir()]
