"""Runs a system in a separate process; reads its steps and its peak memory."""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import ROOT, peer_python

STEP = ROOT / "benchmarks" / "step"  # the folder of this file
# The environment of each system other than this project.
PEERS = {"trl": "trl", "trl_packed": "trl", "fastchat": "fastchat"}


class Failed(Exception):
    """A system failed; the message is the last line of its output."""


@dataclass(frozen=True)
class Run:
    """A run: lists with one value per step, and peak memory."""

    ends: list[float]  # seconds on one clock
    losses: list[float]  # mean per supervised token
    supervised: list[int]  # tokens
    tokens: list[int]  # tokens without padding
    padded: list[int]  # tokens with padding
    rss: int  # KiB, the largest peak among the run's processes
    gpu: int | None  # MiB of the device, the peak during the run


@dataclass(frozen=True)
class Job:
    """One training job, the same for all systems."""

    asked: argparse.Namespace
    folder: Path  # holds model, fastchat_model and plan.json
    flags: list[str]  # of loop/train.py
    plan: dict[str, Any]
    adapter: str | None = None  # the initial adapter of a peer; None: the peer creates one


def run_system(name: str, job: Job, folder: Path) -> Run:
    """Run a system once, in a new folder; raises Failed if it fails."""
    folder.mkdir()
    if name == "bare":
        return _run_bare(job, folder)
    return _run_loop(job, folder) if name == "loop" else _run_peer(name, job, folder)


def _run_bare(job: Job, folder: Path) -> Run:
    out = folder / "out.json"
    command = [sys.executable, str(STEP / "bare_loop.py"), "train", str(out), *job.flags]
    memory = measured(command, job.asked.threads, folder)
    return Run(**json.loads(out.read_text()), **_planned(job), **memory)


def _run_loop(job: Job, folder: Path) -> Run:
    """Run this project through accelerate launch, and read its log."""
    out = folder / "run"
    config = ROOT / "accelerate_configs" / f"{job.asked.config}.yaml"
    command = [str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file"]
    command += [str(config), "loop/train.py", *job.flags, "--output_dir", str(out)]
    memory = measured(command, job.asked.threads, folder)
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ends, losses = ([entry[key] for entry in log] for key in ("seconds", "loss"))
    return Run(ends, losses, **_planned(job), **memory)


def _run_peer(name: str, job: Job, folder: Path) -> Run:
    asked, out, settings = job.asked, folder / "out.json", folder / "settings.json"
    of_job = {
        "model": str(job.folder / "model"),
        "fastchat_model": str(job.folder / "fastchat_model"),
        "plan": str(job.folder / "plan.json"),
        "out": str(out),
        "folder": str(folder / "run"),
        "packing": name == "trl_packed",
        "pairs": asked.model == "t5",
        "max_length": asked.model_max_length,
        "warmup_steps": math.ceil(0.03 * asked.steps),
        "seed": 42,
        "adapter": job.adapter,
    }
    names = ("kind", "precision", "batch", "dropout", "learning_rate", "packed_length")
    settings.write_text(json.dumps(of_job | {name: getattr(asked, name) for name in names}))
    script = ROOT / "benchmarks" / "peers" / f"train_{PEERS[name]}.py"
    command = [str(peer_python(PEERS[name])), str(script), str(settings)]
    memory = measured(command, asked.threads, folder, alone=True)
    return Run(**json.loads(out.read_text()), **memory)


def _planned(job: Job) -> dict[str, Any]:
    """Return the token counts of each step from the plan; this project's log lacks them."""
    names = ("supervised", "tokens", "padded")
    return {name: [step[name] for step in job.plan["steps"]] for name in names}


def checked(words: list[str]) -> str:
    """Run a command and return its standard output; raises Failed with its last line."""
    done = subprocess.run(
        words, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(_last_line(done.stdout + done.stderr))
    return done.stdout


def measured(words: list[str], threads: int, folder: Path, alone: bool = False) -> dict[str, Any]:
    """Run a command; return its peak resident memory, rss in KiB, and GPU memory, gpu in MiB.

    alone: whether this project's modules are hidden from the command. Raises Failed with the last
    line of its output.
    """
    environment = _environment() | {"OMP_NUM_THREADS": str(threads)}
    if alone:
        environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    log = folder / "log"
    with log.open("w") as opened, _GpuMemory() as gpu:
        started = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=opened, stderr=opened)
        # ru_maxrss is the largest peak of the process and of the children it has waited for.
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        raise Failed(_last_line(log.read_text(errors="replace")))
    return {"rss": usage.ru_maxrss, "gpu": gpu.peak}


class _GpuMemory:
    """Polls nvidia-smi, which counts CUDA contexts, caches and libraries for each system."""

    def __init__(self) -> None:
        self.peak: int | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._poll)

    def __enter__(self) -> "_GpuMemory":
        self.before = _gpu_used()
        if self.before is not None:
            self.peak = 0
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.thread.ident:
            self.thread.join()

    def _poll(self) -> None:
        while not self.over.wait(0.3):
            used = _gpu_used()
            if used is not None and self.before is not None and self.peak is not None:
                self.peak = max(self.peak, used - self.before)


def _gpu_used() -> int | None:
    """Return the MiB in use on the first visible GPU; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    words = ["nvidia-smi", "-i", which, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return None if done.returncode else int(done.stdout.split()[0])


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "ChildFailed" not in line]
    return (errors or lines or ["no output"])[-1][:300]
