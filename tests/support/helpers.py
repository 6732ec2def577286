"""Runs the project's commands as a user does, and reads their output files."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import profile

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import Tally, read_dialogues

ROOT = Path(__file__).resolve().parents[2]
HANG = 900.0  # seconds; on any machine, a process that runs longer hangs
BIN = Path(sys.executable).parent
SUPPORT = ROOT / "tests" / "support"


def wait_until(done: Callable[[], object], running: Callable[[], bool] = lambda: True) -> None:
    """Poll until `done` is true; fail if `running` is false before, or after HANG seconds."""
    deadline = time.monotonic() + HANG
    while not done():
        # A process may be done and end between the two calls.
        assert running() or done(), "ended before it happened"
        assert time.monotonic() < deadline, "hangs"
        time.sleep(0.01)


@dataclass
class Allocated:
    """Bytes that tensors on the CPU allocate: the peak, and those that remain at the end."""

    most: int = 0
    left: int = 0


@contextlib.contextmanager
def allocated(mapped: Path | None = None) -> Iterator[Allocated]:
    """Count the bytes that the block's tensors allocate in this thread.

    The number comes from PyTorch's allocator, so it is the same on every machine. It excludes other
    libraries and oneDNN's scratch memory, which depends on the CPU.

    mapped: a folder whose files are not counted. Otherwise a tensor mapped from a file counts with
    the file's full size (torch 2.13, MapAllocator), even if little of it is in memory.
    """
    found = Allocated()
    with torch.backends.mkldnn.flags(enabled=False), profile(profile_memory=True) as profiled:
        yield found
    sizes = {file.stat().st_size for file in mapped.rglob("*")} if mapped else set[int]()
    for event in profiled.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]" and abs(event.nbytes()) not in sizes:
            found.left += event.nbytes()
            found.most = max(found.most, found.left)


@functools.cache
def _server() -> tuple[Path, subprocess.Popen[bytes]]:
    """Start the process that forks commands; return its socket and the process."""
    folder = Path(tempfile.mkdtemp(prefix="lora-loop-"))
    with (folder / "log").open("w") as log:
        # The server ends with this process, which closes the server's standard input.
        server = subprocess.Popen(
            [sys.executable, SUPPORT / "warm_server.py", folder / "socket"],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return folder / "socket", server


def warm() -> dict[str, str]:
    """Return the environment in which commands start warm (tests/support/sitecustomize.py)."""
    return {"LORA_LOOP_WARM": str(_server()[0]), "PYTHONPATH": str(SUPPORT)}


def command(*words: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command, from the repository root by default; return its exit code and output."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **warm(), "PATH": f"{BIN}:{os.environ['PATH']}", **env},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


def start(*words: str | Path, log: Path) -> subprocess.Popen[bytes]:
    """Start a command in the background. Its output is appended to the log."""
    with log.open("a") as opened:
        return subprocess.Popen(
            [str(word) for word in words],
            cwd=ROOT,
            env={**os.environ, **warm(), "PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=opened,
            stderr=opened,
        )


def kill_everything(launched: subprocess.Popen[bytes]) -> None:
    """Kill a command that was started warm, and all processes that it has started."""
    forked = psutil.Process(_server()[1].pid).children(recursive=True)
    for process in [*forked, launched]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    launched.wait()
    psutil.wait_procs(forked)


def launch(
    config: str,
    output: Path,
    *flags: str | Path,
    processes: int = 1,
    script: str = "loop/train.py",
) -> list[dict[str, Any]]:
    """Train through a real `accelerate launch` and return the log."""
    done = command(
        "accelerate", "launch",
        "--config_file", f"accelerate_configs/{config}.yaml",
        "--num_processes", str(processes),
        "--main_process_port", "0",
        script,
        "--output_dir", output,
        *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return log_of(output)


def prompt_of(config: Any) -> dict[str, Tensor]:
    """Return a prompt of ids that every tested model has; for a T5, with the added tokens."""
    known = [*range(100, 120)]
    if not config.is_encoder_decoder:
        return {"input_ids": torch.tensor([known])}
    new = [*range(1000, 1008)]
    return {
        "input_ids": torch.tensor([[*known, *new]]),
        "attention_mask": torch.ones(1, 28, dtype=torch.int64),
        "decoder_input_ids": torch.tensor([[0, *new, *known]]),
    }


def log_of(output: Path) -> list[dict[str, Any]]:
    """Return a run's log, after a check that its two copies are equal."""
    history: list[dict[str, Any]] = json.loads((output / "trainer_state.json").read_text())[
        "log_history"
    ]
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    return history


def adapter_of(output: Path) -> dict[str, Tensor]:
    """Return the adapter's weights."""
    return load_file(output / "adapter_model.safetensors")


def write_dialogues(file: Path, *dialogues: list[str]) -> Path:
    """Write dialogues, each a list of alternating turns, as ShareGPT JSON."""
    records = [
        {
            "id": f"d{number}",
            "conversations": [
                {"from": ("human", "gpt")[turn % 2], "value": text}
                for turn, text in enumerate(turns)
            ],
        }
        for number, turns in enumerate(dialogues)
    ]
    file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return file


def dialogues_in(file: Path, *how: Any, **more: Any) -> tuple[list[Dialogue], Tally]:
    """Return all dialogues of a file, and the tally of its records."""
    tally = Tally()
    return [*read_dialogues([file], tally, *how, **more)], tally
