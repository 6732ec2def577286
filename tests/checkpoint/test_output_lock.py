"""One run at a time writes to an output folder, also after a run that failed before step 1."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data.files.lock import LockHeld, locked
from loop.checkpoint.run_folder import LOCK
from tests.support.helpers import ROOT, wait_until

HOLD = """
import sys
sys.modules.setdefault("bitsandbytes", None)
from data.errors import UserError
from loop.checkpoint import run_folder
from loop.config.flags import Config
run_folder.LOCK_TIMEOUT = 60.0
with run_folder.locked_output_dir(Config(output_dir=sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
    raise UserError("failed before step 1")
"""


def start_run(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the folder's lock until its stdin closes, and then fails."""
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", HOLD, str(folder)]
    return subprocess.Popen(words, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def held(run: subprocess.Popen[str]) -> bool:
    assert run.stdout
    return run.stdout.readline().strip() == "held"


def fail(run: subprocess.Popen[str]) -> None:
    assert "failed before step 1" in run.communicate()[1]


def test_a_run_that_waited_for_one_that_failed_before_step_1_excludes_a_third(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs" / "new"
    lock = folder / LOCK
    first = start_run(folder)
    assert held(first)
    second = start_run(folder)
    try:

        def waits() -> bool:
            files = psutil.Process(second.pid).open_files()
            return any(file.path == str(lock) for file in files)

        wait_until(waits, lambda: second.poll() is None)
        inode = lock.stat().st_ino
        with lock.open():  # The inode stays in use, so that a new file has another one.
            fail(first)  # It created the folder, and removes it.
            assert held(second)
            assert lock.stat().st_ino != inode
        with pytest.raises(LockHeld, match=f"process {second.pid} "), locked(lock, timeout=0):
            pass
    finally:
        fail(second)
