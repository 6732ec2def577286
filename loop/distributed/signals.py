"""Exit codes, stop requests, and the status file in which a rank reports to launch.sh.

docs/architecture.md, "Launch protocol", describes how launch.sh, launcher and ranks communicate.
"""

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data.errors import RunError, Stopped, UserError

STATUS_FILE = "LORA_LOOP_STATUS_FILE"  # set by launch.sh: the path of the status file
STOP_SUFFIX = ".stop"  # status file + suffix: the stop file, by which launch.sh requests a stop
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
GRACE_SECONDS = 20.0  # from a stop request, or the launcher's death, until a rank kills itself
POLL_SECONDS = 0.5
STORE_SECONDS = 2.0  # how long the first rank of machine 0 delays its exit: see _hosts_store
LAUNCH_NAME = "LORA_LOOP_COMMAND"  # set by launch.sh: an id, the same for all of its launches
LAUNCH_FILE = ".launch"


@dataclass(frozen=True)
class Outcome:
    """How `main` ended on this rank."""

    code: int = 0
    label: str = ""  # "error" or "stopped"; empty: there is nothing to print
    message: str = ""
    reason: str = ""  # for the status file
    alone: bool = False  # only this rank ends, so the launcher must end the others
    by_signal: bool = False  # ended by a stop signal outside of the training loop


def run_and_exit(main: Callable[[], None]) -> None:
    """Run `main`, print its error without a traceback, and exit with the run's exit code.

    `accelerate launch` turns every exit code but 0 into 1 and prints a trace. Under launch.sh,
    therefore, the first rank of a machine writes the code to the status file, and all ranks exit
    with 0. A rank that failed alone exits with its code: then the launcher ends the other ranks.
    """
    outcome = _run(main)
    # _follow_launcher polls, so it may send a signal for a request that is already carried out.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _print_message(outcome)
    if outcome.by_signal and not outcome.alone:
        time.sleep(1)  # Every rank sees the stop file within this time, before the first exits.
    if _is_first_rank():
        _write_status(outcome.code, outcome.reason)
    if _hosts_store():
        time.sleep(STORE_SECONDS)
    sys.exit(0 if _status_file() and not outcome.alone else outcome.code)


def _run(main: Callable[[], None]) -> Outcome:
    """Run `main` and return how it ended; exceptions other than UserError are not caught."""
    for number in STOP_SIGNALS:  # Within the training loop, Saver handles them (saver.py).
        signal.signal(number, _exit_on_signal)
    try:
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # set by `accelerate launch`
            # Inside `try`, since a stop may already be requested.
            threading.Thread(target=_follow_launcher, args=(os.getppid(),), daemon=True).start()
        with _convert_disk_errors():
            main()
    except UserError as error:
        return _outcome_of(error)
    except SystemExit as error:
        if error.code != Stopped.exit_code:
            raise
        if isinstance(error.__context__, Stopped):  # a second signal, after the run had stopped
            return _outcome_of(error.__context__)
        return Outcome(
            code=Stopped.exit_code,
            label="stopped",
            message="on request, outside of the training loop. The same command resumes the run.",
            alone=not launcher_asks(),
            by_signal=True,
        )
    return Outcome()


def _outcome_of(error: UserError) -> Outcome:
    return Outcome(
        code=error.exit_code,
        label="stopped" if isinstance(error, Stopped) else "error",
        message=str(error),
        reason=str(error).splitlines()[0],
        alone=os.environ.get("WORLD_SIZE", "1") != "1" and not error.known_to_all,
    )


def _print_message(outcome: Outcome) -> None:
    """Print on the first rank of the machine, or on the only rank that met the error."""
    if not outcome.label:
        return
    if _is_first_rank():
        print(f"{outcome.label}: {outcome.message}", file=sys.stderr, flush=True)
    elif outcome.alone and not outcome.by_signal and not _first_rank_reports():
        where = f"on rank {os.environ['RANK']}"
        print(f"{outcome.label}, {where}: {outcome.message}", file=sys.stderr, flush=True)


def _first_rank_reports() -> bool:
    """Return whether the machine's first rank writes the status file within 20 seconds."""
    deadline = time.monotonic() + 20
    while _status_file() and time.monotonic() < deadline:
        if _has_status():
            return True
        time.sleep(0.05)
    return False


def _write_status(code: int, reason: str = "") -> None:
    """Replace the status file, if there is one, with the line `CODE REASON`."""
    status = _status_file()
    if status is None:
        return
    partial = status.with_name(f"{status.name}.partial")
    partial.write_text(f"{code} {reason}\n")
    if status.exists():
        partial.replace(status)
    else:  # launch.sh has removed it and ended: its launcher was killed.
        partial.unlink()


def _has_status() -> bool:
    """Return whether the status file is written."""
    status = _status_file()
    return status is not None and status.is_file() and status.stat().st_size > 0


def _status_file() -> Path | None:
    """Return the status file's path; None if launch.sh did not start this process."""
    name = os.environ.get(STATUS_FILE)
    return Path(name) if name else None


def _is_first_rank() -> bool:
    """Return whether this is the first rank of its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _hosts_store() -> bool:
    """Return whether this machine's launcher holds the store of a run on several machines.

    When their ranks have exited, all launchers wait at a barrier in this store. If this launcher
    exits before another one has read the store, the other one prints a traceback (torch 2.13,
    distributed/elastic/utils/store.py, barrier).
    """
    return os.environ.get("GROUP_RANK") == "0" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1"


def launcher_asks() -> bool:
    """Return whether launch.sh requests a stop."""
    status = _status_file()
    return status is not None and status.with_name(status.name + STOP_SUFFIX).exists()


def _exit_on_signal(number: int, _: FrameType | None) -> None:
    """Exit on a stop signal outside of the training loop, where there is nothing to save."""
    for each in STOP_SIGNALS:  # A second signal would interrupt the exit.
        signal.signal(each, signal.SIG_IGN)
    sys.exit(Stopped.exit_code)


def _follow_launcher(launcher: int) -> None:
    """Turn a stop request or the launcher's death into SIGTERM; after the grace period, exit.

    torchrun starts each rank in its own session, so ranks survive when their launcher is killed. A
    launcher that gets SIGTERM kills its ranks after 30 seconds, so launch.sh uses a stop file.
    This runs in a thread, since Python runs no signal handler while a collective waits.
    """
    while not (is_orphan := os.getppid() != launcher) and not launcher_asks():
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    if is_orphan:
        time.sleep(GRACE_SECONDS)
    else:
        _wait_for_exit(launcher)
    os._exit(128 + signal.SIGTERM)


def _wait_for_exit(launcher: int) -> None:
    """Return once the launcher is gone; exit if this rank runs longer than the grace period.

    Inside the training loop there is no limit, since a step may take longer.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while os.getppid() == launcher:
        in_loop = signal.getsignal(signal.SIGTERM) not in (_exit_on_signal, signal.SIG_IGN)
        if not in_loop and time.monotonic() > deadline:  # A collective waits for an exited rank.
            if _is_first_rank() and not _has_status():
                _write_status(Stopped.exit_code)
            os._exit(Stopped.exit_code)
        time.sleep(POLL_SECONDS)


@contextmanager
def _convert_disk_errors() -> Iterator[None]:
    """Turn the OSError of a full or broken disk into a RunError with one message."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise RunError(
            f"{error.filename or 'a file'}: cannot be written: {error.strerror}."
        ) from error


def is_restart(output: Path) -> bool:
    """Return whether the same command has already started a run in this folder.

    torchelastic and `launch.sh --until-done` restart ranks with the same flags. A flag such as
    --resume_from_checkpoint False must take effect only at the first start.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if LAUNCH_NAME not in os.environ and not restarted:
        return False
    file = output / LAUNCH_FILE
    return file.is_file() and file.read_text(encoding="utf-8") == _launch_name()


def record_launch(output: Path) -> None:
    """Write the command's id into the folder, for `is_restart`."""
    (output / LAUNCH_FILE).write_text(_launch_name(), encoding="utf-8")


def _launch_name() -> str:
    return os.environ.get(LAUNCH_NAME) or f"launcher {os.getppid()}"
