"""Tells a launch that starts its ranks again from a new one, whose flags count afresh."""

import os
from pathlib import Path

COMMAND = "LORA_LOOP_COMMAND"  # launch.sh's name for itself, the same in each of its launches
FILE = ".launch"


def is_restart(output: Path) -> bool:
    """Say whether this launch has begun in the folder before: then its flags were obeyed.

    torchelastic and `launch.sh --until-done` give restarted ranks the same flags again.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if COMMAND not in os.environ and not restarted:
        return False
    file = output / FILE
    return file.is_file() and file.read_text(encoding="utf-8") == _name()


def begun(output: Path) -> None:
    """Leave the launch's name in the folder."""
    (output / FILE).write_text(_name(), encoding="utf-8")


def _name() -> str:
    return os.environ.get(COMMAND) or f"launcher {os.getppid()}"
