"""Preparations resume after a kill, end on Ctrl-C, and exclude each other."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.errors import UserError
from data.preparation import clean, convert, job, parallel, stats
from data.preparation.parallel import chunks, in_order
from tests.support.helpers import HANG, ROOT, wait_until, write_dialogues

CORES = len(os.sched_getaffinity(0))


def dialogues(folder: Path, count: int) -> Path:
    texts = [[f"Where does road {n} lead to?", f"To town {n} of many. " * 20] for n in range(count)]
    return write_dialogues(folder / "in.json", *texts)


# A run that waits forever at its first result.
UNENDING = """
import threading
from data.__main__ import main
from data.preparation.job import Journal
Journal.add = lambda *_: threading.Event().wait()
main()
"""


def started(data: Path, out: Path) -> subprocess.Popen[str]:
    """Start a run on all cores, and wait until its workers run."""
    words = [sys.executable, "-c", UNENDING, "convert", "--in", data, "--out", out]
    run = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    process = psutil.Process(run.pid)
    lock = str(out.with_name(f".{out.name}.lock"))

    def has_workers() -> bool:
        """Return whether all workers run and have closed the lock that they inherited."""
        workers = process.children()
        opened = [file.path for worker in workers for file in worker.open_files()]
        return len(workers) >= CORES and lock not in opened

    wait_until(has_workers, lambda: run.poll() is None)
    return run


@pytest.mark.skipif(CORES < 2, reason="on one core there are no other processes")
def test_the_workers_of_a_killed_run_end_and_the_next_run_resumes(
    tmp_path: Path,
) -> None:
    data, out = dialogues(tmp_path, 6000), tmp_path / "out.jsonl"
    run = started(data, out)
    others = psutil.Process(run.pid).children()
    for one in others:
        one.suspend()  # so that they exist when the next run begins
    run.kill()
    run.wait()
    convert.main(["--in", str(data), "--out", str(out), "--processes", "1"])
    assert len(out.read_text().splitlines()) == 6000
    for one in others:
        one.resume()
    assert psutil.wait_procs(others, timeout=HANG)[1] == []


@pytest.mark.skipif(CORES < 2, reason="on one core there are no other processes")
def test_ctrl_c_ends_a_run_and_its_processes_without_a_traceback(tmp_path: Path) -> None:
    run = started(dialogues(tmp_path, 6000), tmp_path / "out.jsonl")
    others = psutil.Process(run.pid).children()
    os.killpg(run.pid, signal.SIGINT)  # a terminal also sends it to all processes
    stderr = run.communicate()[1]
    assert run.returncode == 130
    assert "Traceback" not in stderr
    assert psutil.wait_procs(others, timeout=HANG)[1] == []


def test_ctrl_c_that_another_thread_takes_waits_until_the_processes_have_started() -> None:
    over = threading.Event()
    other = threading.Thread(target=over.wait, daemon=True)
    other.start()  # before the main thread blocks the signal
    done = []

    def start() -> None:
        with parallel._no_ctrl_c():
            os.kill(os.getpid(), signal.SIGINT)
            # until the other thread has received it
            wait_until(lambda: signal.SIGINT not in signal.sigpending())
            time.sleep(0.2)
            done.append("started")

    with pytest.raises(KeyboardInterrupt):
        start()
    over.set()
    assert done == ["started"]


def test_a_second_run_with_the_same_output_is_refused(tmp_path: Path) -> None:
    data, out = dialogues(tmp_path, 1), tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "data", "convert", "--in", data, "--out", out]
    with job.locked_output(out):
        second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert second.returncode == 2
        expected = f"error: --out {out}: another run is writing it: process {os.getpid()} of "
        assert second.stderr.startswith(expected)
        assert second.stderr.count("\n") == 1
    assert subprocess.run(words, cwd=ROOT).returncode == 0


def test_no_more_processes_than_cores_are_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    class Pool(parallel.ProcessPoolExecutor):
        def __init__(self, processes: int, **how: Any) -> None:
            asked.append(processes)
            super().__init__(min(processes, 2), **how)

    monkeypatch.setattr(parallel, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    for processes in (0, 2, 100_000):
        assert sum(in_order(len, chunks([dialogues(tmp_path, 3)]), processes)) == 3
    assert asked == [3, 2, 3]
    with pytest.raises(SystemExit) as ended:
        convert.main(["--in", "a.json", "--out", str(tmp_path / "b.json"), "--processes", "-1"])
    assert ended.value.code == 2
    assert "expected a whole number, 0 or more" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_costs_no_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = dialogues(tmp_path, 300), tmp_path / "out.jsonl"
    words = ["--in", str(data), "--out", str(out), "--processes", "1", "--report"]
    blocked = tmp_path / "in.json/report.json"  # in.json is a file, not a folder
    with pytest.raises(UserError, match=r"--report .*in.json/report.json: cannot be written"):
        convert.main([*words, str(blocked)])
    assert not out.exists()
    convert.main([*words, str(tmp_path / "report.json")])
    assert "resumed after record 300" in capsys.readouterr().err
    assert json.loads((tmp_path / "report.json").read_text())["kept"] == 300
    assert len(out.read_text().splitlines()) == 300


def test_nan_and_infinity_are_written_as_null(tmp_path: Path) -> None:
    turns = '[{"from": "human", "value": "\\ud800 a"}, {"from": "gpt", "value": "b"}]'
    data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    numbers = '"score": NaN, "list": [1e999, {"low": -Infinity}], "good": 1.5'
    data.write_text(f'{{"conversations": {turns}, {numbers}}}')
    clean.main(["--in", str(data), "--out", str(out), "--skip", "invisible", "short"])
    record = json.loads(out.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert record.pop("conversations")[0]["value"] == "\ud800 a"
    assert record == {"score": None, "list": [None, {"low": None}], "good": 1.5}


def test_a_name_that_is_too_long_is_named(tmp_path: Path) -> None:
    name = str(tmp_path / f"{'a' * 300}.jsonl")
    with pytest.raises(UserError, match="cannot be written: File name too long"):
        convert.main(["--in", str(dialogues(tmp_path, 1)), "--out", name])


@pytest.mark.parametrize("command", [clean, stats])
def test_a_link_to_itself_is_named(command: Any, tmp_path: Path) -> None:
    link = tmp_path / "in.json"
    link.symlink_to(link)
    with pytest.raises(UserError, match=r"in\.json: cannot be read: Too many levels"):
        command.main(["--in", str(link), "--out", str(tmp_path / "out.jsonl")])
