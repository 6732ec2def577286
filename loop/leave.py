"""Leaves a process with the run's exit code: one message for a user's mistake, no traceback."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from data.errors import UserError

STATUS_FILE = "LORA_LOOP_STATUS_FILE"
GRACE = 20.0  # seconds that a rank may take to close its trackers once its launcher is gone


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a rank's main function and leave with the run's exit code.

    launch.sh names a status file, since `accelerate launch` turns every failure into 1 and adds
    a trace. The first rank of the machine writes the code there; all ranks then leave with 0,
    unless one of them failed alone: the launcher must learn of that, or the others would wait.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # `accelerate launch` started us.
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    # So that trackers are closed when a launcher ends the run; it sends SIGKILL later.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code, status = 0, os.environ.get(STATUS_FILE)
    first, alone = os.environ.get("LOCAL_RANK", "0") == "0", False
    try:
        main()
    except UserError as error:
        code = 2
        alone = os.environ.get("WORLD_SIZE", "1") != "1" and not error.known_to_all
        if first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif alone and not _first_rank_tells(status):
            print(f"error, on rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
    if status and first:
        Path(status).write_text(str(code))
    sys.exit(0 if status and not alone else code)


def _first_rank_tells(status: str | None) -> bool:
    """Wait for the first rank of the machine to meet the same mistake and write its code."""
    deadline = time.monotonic() + 20
    while status and time.monotonic() < deadline:
        if Path(status).is_file() and Path(status).stat().st_size:
            return True
        time.sleep(0.05)
    return False


def _follow(launcher: int) -> None:
    """End this process when its launcher is gone.

    torchrun's workers are sessions of their own: a launcher killed outright would leave them
    training. A signal's handler may not get its turn while a collective waits, hence the thread.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)
