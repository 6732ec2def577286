"""`doctor --trial`: runs three steps of the real launch in a temporary folder, and times them."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from loop.config.flags import ROOT, Config
from loop.config.load import dump
from loop.distributed.signals import STATUS_FILE
from loop.doctor.launch import Launch

STEPS = 3  # the first one warms up and is not timed
# Settings that a trial replaces. The flags' `in_trial` values turn other output off.
TRIAL_STEPS: dict[str, Any] = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "logging_strategy": "steps",
}


@dataclass(frozen=True)
class Trial:
    """The measurements of a trial."""

    startup: float  # seconds until the end of step 1
    step: float  # seconds per step
    tokens_per_second: float
    peak: float  # bytes


def run_trial(config: Config, launch: Launch) -> Trial:
    """Train for a few steps through the launch, and return the measurements.

    Raises UserError if the training fails, and for a launch of several machines.
    """
    if launch.machines > 1:
        raise UserError(
            f"--trial: found a launch of {launch.machines} machines; expected one. Leave --trial "
            "out."
        )
    with tempfile.TemporaryDirectory(prefix="lora-loop-trial-") as folder:
        output, settings, status = (Path(folder) / name for name in ("run", "run.yaml", "status"))
        status.touch()  # The ranks replace this file but never create it (signals.py).
        values = {**trial_settings(), "output_dir": str(output)}
        settings.write_text(dump(dataclasses.replace(config, **values)), "utf-8")
        # Without the launch's variables that examine() has set: the launcher sets its own.
        environment = {n: value for n, value in os.environ.items() if n not in launch.variables}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", str(launch.file), "--num_processes", str(launch.ranks)),
                *("--main_process_port", "0", str(ROOT / "loop" / "train.py")),
                *("--config", str(settings)),
                *("--trust_remote_code", str(config.trust_remote_code)),
            ],
            env={**environment, STATUS_FILE: str(status)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        text = status.read_text("utf-8") if status.is_file() else ""
        code, _, message = text.partition(" ")
        if done.returncode or code != "0":
            last_line = [line for line in done.stdout.splitlines() if line.strip()][-1:]
            reason = message.strip() or "".join(last_line) or "no output"
            raise UserError(
                f"--trial: training ended with exit code {code or done.returncode}: {reason}"
            )
        lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
        return trial_from_log([json.loads(line) for line in lines])


def trial_settings() -> dict[str, Any]:
    """Return the settings that a trial replaces."""
    values = {field.name: field.metadata["in_trial"] for field in dataclasses.fields(Config)}
    return {name: value for name, value in values.items() if value is not ...} | TRIAL_STEPS


def trial_from_log(log: list[dict[str, Any]]) -> Trial:
    """Return the measurements from a log with one entry per step; step 1 is not timed.

    >>> step = {"tokens_per_second": 50.0, "peak_memory_gib": 2, "startup_seconds": 4.0}
    >>> log = [step | {"seconds": 6.0}, step | {"seconds": 7.0}, step | {"seconds": 8.0}]
    >>> trial_from_log(log)
    Trial(startup=10.0, step=1.0, tokens_per_second=50.0, peak=2147483648)
    """
    first, last = log[0], log[-1]
    seconds = last["seconds"] - first["seconds"]
    tokens = sum(
        entry["tokens_per_second"] * (entry["seconds"] - before["seconds"])
        for before, entry in itertools.pairwise(log)
    )
    return Trial(
        startup=first["startup_seconds"] + first["seconds"],
        step=seconds / (len(log) - 1),
        tokens_per_second=tokens / seconds,
        peak=max(entry["peak_memory_gib"] for entry in log) * 2**30,
    )
