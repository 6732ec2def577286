"""Leaves a process with the run's exit code: one message for a user's mistake, no traceback."""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from data.errors import RunError, Stopped, UserError

STATUS_FILE = "LORA_LOOP_STATUS_FILE"
STOP = ".stop"  # what launch.sh adds to that name for the file by which it asks for a stop
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
GRACE = 20.0  # seconds that a rank may take to save and leave once its launcher is gone


def run_and_exit(main: Callable[[], None]) -> None:
    """Run a rank's main function and leave with the run's exit code.

    launch.sh names a status file, since `accelerate launch` turns every failure into 1 and adds
    a trace. The first rank of the machine writes the code there; all ranks then leave with 0,
    unless one of them failed alone: the launcher must learn of that, or the others would wait.
    """
    status = os.environ.get(STATUS_FILE)
    # Outside of the loop, which answers them itself (saver.py), there is nothing to save.
    for number in STOPS:
        signal.signal(number, _stop)
    code, reason = 0, ""
    first, alone = os.environ.get("LOCAL_RANK", "0") == "0", False
    try:
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # `accelerate launch` started us.
            # In here, as it may be asked to stop already.
            threading.Thread(target=_follow, args=(os.getppid(), status), daemon=True).start()
        with _told_disk():
            main()
    except UserError as error:
        code, reason = error.exit_code, str(error).splitlines()[0]
        alone = os.environ.get("WORLD_SIZE", "1") != "1" and not error.known_to_all
        word = "stopped" if isinstance(error, Stopped) else "error"
        if first:
            print(f"{word}: {error}", file=sys.stderr, flush=True)
        elif alone and not _first_rank_tells(status):
            print(f"{word}, on rank {os.environ['RANK']}: {error}", file=sys.stderr, flush=True)
    except SystemExit as left:
        if left.code != Stopped.exit_code:
            raise
        code, alone = Stopped.exit_code, not launcher_asks()
        if first:
            text = "stopped: asked to, outside of training. The same command goes on."
            print(text, file=sys.stderr, flush=True)
        if not alone:
            time.sleep(1)  # So that no rank loses another before it is told itself.
    if status and first:
        Path(status).write_text(f"{code} {reason}\n")
    sys.exit(0 if status and not alone else code)


@contextmanager
def _told_disk() -> Iterator[None]:
    """Turn what a full or broken disk raises, wherever it is met, into one message."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise RunError(
            f"{error.filename or 'a file'}: cannot be written: {error.strerror}."
        ) from error


def launcher_asks() -> bool:
    """Say whether launch.sh was asked to stop."""
    status = os.environ.get(STATUS_FILE)
    return bool(status) and Path(f"{status}{STOP}").exists()


def _first_rank_tells(status: str | None) -> bool:
    """Wait for the first rank of the machine to meet the same mistake and write its code."""
    deadline = time.monotonic() + 20
    while status and time.monotonic() < deadline:
        if Path(status).is_file() and Path(status).stat().st_size:
            return True
        time.sleep(0.05)
    return False


def _stop(number: int, _: FrameType | None) -> None:
    for each in STOPS:  # A second one would end what answers the first.
        signal.signal(each, signal.SIG_IGN)
    sys.exit(Stopped.exit_code)


def _follow(launcher: int, status: str | None) -> None:
    """Pass a request of launch.sh on as a signal; end this process when its launcher is gone.

    torchrun's workers are sessions of their own: a launcher killed outright would leave them
    training, and told to stop it kills them after 30 seconds. launch.sh therefore asks by a file.
    A signal's handler may not get its turn while a collective waits, hence the thread.
    """
    asked = 0.0
    while os.getppid() == launcher:
        if not asked and launcher_asks():
            asked = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        outside = signal.getsignal(signal.SIGTERM) in (_stop, signal.SIG_IGN)
        if asked and outside and time.monotonic() > asked + GRACE:
            os._exit(Stopped.exit_code)  # It waits for a rank that has left already.
        time.sleep(0.5)
    if not asked:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


LAUNCH_NAME = "LORA_LOOP_COMMAND"  # launch.sh's name for itself, the same in each of its launches
LAUNCH_FILE = ".launch"


def is_restart(output: Path) -> bool:
    """Say whether this launch has begun in the folder before: then its flags were obeyed.

    torchelastic and `launch.sh --until-done` give restarted ranks the same flags again.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if LAUNCH_NAME not in os.environ and not restarted:
        return False
    file = output / LAUNCH_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == _name()


def record_launch(output: Path) -> None:
    """Leave the launch's name in the folder."""
    (output / LAUNCH_FILE).write_text(_name(), encoding="utf-8")


def _name() -> str:
    return os.environ.get(LAUNCH_NAME) or f"launcher {os.getppid()}"
