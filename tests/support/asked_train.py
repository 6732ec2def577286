"""loop/train.py, in which rank 1 alone sees a request to stop, in the middle of its third step.

ASKED: "launcher" for a request of launch.sh, by its file; "signal" for a signal to that rank.
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
    """Ask in the middle of the step, after all ranks have met in the one before."""
    calls.append(1)
    if len(calls) == 3:
        if os.environ["ASKED"] == "launcher":
            Path(f"{os.environ[signals.STATUS_FILE]}{signals.STOP}").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return loss_sum(*arguments)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        train.supervised_loss_sum = interrupted
    else:
        # It looks for the file twice a second: this rank is always too late.
        signals.launcher_asks = saver.launcher_asks = lambda: False
    run_and_exit(train.main)
