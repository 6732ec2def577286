"""Runs loop/train.py; only rank 1 gets a stop request, in the middle of its third step.

Environment variable ASKED: "launcher": a stop file of launch.sh. "signal": a signal to rank 1.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from loop import train
from loop.checkpoint import saver
from loop.distributed import signals
from loop.distributed.signals import run_and_exit

loss_sum = train.supervised_loss_sum
calls: list[int] = []


def interrupted(*arguments: Any) -> Any:
    """Request the stop in the middle of a step, after all ranks have finished the previous step."""
    calls.append(1)
    if len(calls) == 3:
        if os.environ["ASKED"] == "launcher":
            Path(f"{os.environ[signals.STATUS_FILE]}{signals.STOP_SUFFIX}").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return loss_sum(*arguments)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        train.supervised_loss_sum = interrupted
    else:
        # As if this rank, which polls for the file, always polled too early.
        signals.launcher_asks = saver.launcher_asks = lambda: False
    run_and_exit(train.main)
