"""`doctor --trial`: the launch itself, for three steps in a folder that goes, timed."""

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

STEPS = 3  # the first warms up, and is not counted
# Beside `in_trial` of the flags, which switches off all that is not a step.
TRIAL_STEPS: dict[str, Any] = {
    "max_steps": STEPS,
    "logging_steps": 1,
    "logging_strategy": "steps",
}


@dataclass(frozen=True)
class Trial:
    """What was measured: seconds until the first step's end, of a step, tokens a second, bytes."""

    startup: float
    step: float
    tokens_per_second: float
    peak: float


def run_trial(config: Config, launch: Launch) -> Trial:
    """Train for a few steps through the launch, and return what they took.

    Raises UserError where the training does, and for a launch of several machines.
    """
    if launch.machines > 1:
        raise UserError(
            f"--trial: found a launch of {launch.machines} machines; expected one. Leave it out."
        )
    with tempfile.TemporaryDirectory(prefix="lora-loop-trial-") as folder:
        output, settings, status = (Path(folder) / name for name in ("run", "run.yaml", "status"))
        status.touch()  # The ranks replace it, and never create it (signals.py).
        values = {**trial_settings(), "output_dir": str(output)}
        settings.write_text(dump(dataclasses.replace(config, **values)), "utf-8")
        outside = {name: v for name, v in os.environ.items() if name not in launch.told}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", str(launch.file), "--num_processes", str(launch.ranks)),
                *("--main_process_port", "0", str(ROOT / "loop" / "train.py")),
                *("--config", str(settings)),
                *("--trust_remote_code", str(config.trust_remote_code)),
            ],
            env={**outside, STATUS_FILE: str(status)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        told = status.read_text("utf-8").partition(" ") if status.is_file() else ("", "", "")
        if done.returncode or told[0] != "0":
            said = [line for line in done.stdout.splitlines() if line.strip()][-1:]
            reason = told[2].strip() or "".join(said) or "it said nothing"
            code = told[0] or done.returncode
            raise UserError(f"--trial: training ended with exit code {code}: {reason}")
        lines = (output / "metrics.jsonl").read_text("utf-8").splitlines()
        return measured([json.loads(line) for line in lines])


def trial_settings() -> dict[str, Any]:
    """Return the settings that a trial replaces."""
    values = {field.name: field.metadata["in_trial"] for field in dataclasses.fields(Config)}
    return {name: value for name, value in values.items() if value is not ...} | TRIAL_STEPS


def measured(log: list[dict[str, Any]]) -> Trial:
    """Return what a log of single steps tells, the first of them left out.

    >>> step = {"tokens_per_second": 50.0, "peak_memory_gib": 2, "startup_seconds": 4.0}
    >>> measured([step | {"seconds": 6.0}, step | {"seconds": 7.0}, step | {"seconds": 8.0}])
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
