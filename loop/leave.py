"""Leaves a process with the run's exit code: one message for a user's mistake, no traceback."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from data.errors import UserError

STATUS_FILE = "LORA_LOOP_STATUS_FILE"


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a rank's main function and leave with the run's exit code.

    launch.sh names a status file, since `accelerate launch` turns every failure into 1 and adds
    a trace. The first rank of the machine writes the code there; all ranks then leave with 0.
    """
    code, status = 0, os.environ.get(STATUS_FILE)
    try:
        main()
    except UserError as error:
        code = 2
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not (status and _appears(Path(status))):
            # The first rank did not fail so; the launcher must be told, or it would wait for us.
            print(f"error, on rank {os.environ['RANK']} alone: {error}", file=sys.stderr)
            sys.exit(code)
    if status and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(status).write_text(str(code))
    sys.exit(0 if status else code)


def _appears(file: Path, seconds: float = 20.0) -> bool:
    """Wait until the file holds something."""
    deadline = time.monotonic() + seconds
    while not (file.is_file() and file.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    return file.is_file() and file.stat().st_size > 0
