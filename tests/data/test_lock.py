"""One process at a time holds a lock file, and the lock ends with its holder."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data.files.lock import LockHeld, locked
from tests.support.helpers import HANG, ROOT, wait_until

HOLD = """
import sys
from pathlib import Path
from data.files.lock import locked
with locked(Path(sys.argv[1]), timeout=float(sys.argv[2]), unlink=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen[str]:
    """Start a process that waits for the lock, prints a line, and holds it until stdin closes."""
    words = [sys.executable, "-c", HOLD, str(path), str(HANG)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=HANG)
    assert process.returncode == 0


def has_open(process: subprocess.Popen[str], path: Path) -> bool:
    return any(file.path == str(path) for file in psutil.Process(process.pid).open_files())


def test_a_process_that_waited_on_an_unlinked_lock_file_still_excludes_others(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.lock"
    with locked(path, unlink=True):
        waiting = start_holder(path)
        wait_until(lambda: has_open(waiting, path), lambda: waiting.poll() is None)
    assert read_line(waiting) == "held"
    holder = rf"^process {waiting.pid} of .* on .*, since 2"
    with pytest.raises(LockHeld, match=holder), locked(path, timeout=0):
        pass
    end(waiting)
    assert not path.exists()


def test_a_killed_holder_and_its_forked_workers_leave_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "folder/a.lock"
    code = (
        "import multiprocessing, os, sys, time\n"
        "from pathlib import Path\n"
        "from data.files.lock import locked\n"
        "def work(pipe):\n"
        "    pipe.send(os.getpid()); time.sleep(1000)\n"
        "with locked(Path(sys.argv[1])):\n"
        "    fork = multiprocessing.get_context('fork')\n"
        "    ours, theirs = fork.Pipe()\n"
        "    fork.Process(target=work, args=(theirs,)).start()\n"
        "    print(ours.recv(), flush=True); sys.stdin.read()\n"
    )
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", code, str(path)]
    holder = subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    worker = psutil.Process(int(read_line(holder)))
    try:
        with pytest.raises(LockHeld), locked(path, timeout=0):
            pass
        holder.kill()
        holder.wait()
        with locked(path, timeout=0) as has_lock:
            assert has_lock
            assert path.read_text().startswith(f"process {os.getpid()} of ")
        assert worker.is_running()
    finally:
        worker.kill()
    assert path.exists()  # without `unlink` it stays


def count_alone(path: Path, counter: Path) -> None:
    """Add to a counter; if several processes do so at once, counts are lost."""
    for _ in range(20):
        with locked(path, unlink=True):
            counter.write_text(str(int(counter.read_text()) + 1))


def test_four_processes_that_unlink_their_lock_file_never_hold_it_together(
    tmp_path: Path,
) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("spawn")
    paths = (tmp_path / "a.lock", counter)
    processes = [context.Process(target=count_alone, args=paths) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG)
    assert counter.read_text() == "80"
