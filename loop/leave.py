"""Leaves a process with the run's exit code: one message for a user's mistake, no traceback."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data.errors import UserError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STATUS_FILE = "LORA_LOOP_STATUS_FILE"


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a rank's main function and leave with the run's exit code.

    launch.sh names a status file, since `accelerate launch` turns every failure into 1 and adds
    a trace. The first rank of the machine writes the code there; all ranks then leave with 0.
    """
    # torchrun's workers are sessions of their own: a launcher killed outright would leave them
    # training. Linux tells them of it.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # So that trackers are closed when a launcher ends the run; it sends SIGKILL later.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code, status = 0, os.environ.get(STATUS_FILE)
    try:
        main()
    except UserError as error:
        code = 2
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not _first_rank_tells(status):
            # It did not fail so; the launcher must be told, or it would wait for us.
            print(f"error, on rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
            sys.exit(code)
    if status and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(status).write_text(str(code))
    sys.exit(0 if status else code)


def _first_rank_tells(status: str | None) -> bool:
    """Wait for the first rank of the machine to report the same mistake.

    With a status file it writes there. Without one it leaves with 2, upon which the launcher ends
    this process while it waits.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if status and Path(status).is_file() and Path(status).stat().st_size:
            return True
        time.sleep(0.05)
    return False
