"""Renders the runs of run.py as a Markdown table, with machine, versions and settings."""

import argparse
import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.environments import PACKAGES
from benchmarks.step.measure import Run

NAMES = {
    "bare": "bare PyTorch loop",
    "loop": "this project",
    "trl": "TRL SFTTrainer",
    "trl_packed": "TRL SFTTrainer, packing",
    "fastchat": "FastChat train_lora",
}
COLUMNS = (
    *("system", "supervised tokens/s", "least to most", "real tokens/s", "run tokens/s"),
    *("s a step", "peak RSS, MiB", "GPU, MiB", "MFU, %", "loss, step 1", "this project is"),
)


def markdown(
    asked: argparse.Namespace,
    plan: dict[str, Any],
    runs: dict[str, list[Run]],
    failures: dict[str, str],
    peaks: list[dict[str, float]],
    loads: list[float],
) -> str:
    """Return the heading, the table and the notes as Markdown."""
    columns = [name for name in COLUMNS if asked.gpu or not name.startswith("GPU")]
    cells = {name: _cells(asked, plan, of, peaks) for name, of in runs.items() if of}
    ours = _rate(asked, runs.get("loop", []))
    lines = [*_heading(asked, plan, peaks, loads), "", _row(columns), _row(["---"] * len(columns))]
    for name, values in cells.items():
        theirs = _rate(asked, runs[name])
        if ours and theirs and name != "loop":
            values["this project is"] = f"{ours / theirs:.3g} x"
        values |= {"system": NAMES[name]}
        lines.append(_row([values.get(column, "") for column in columns]))
    lines += ["", *_notes(asked, runs, failures)]
    return "\n".join(lines) + "\n"


def _cells(
    asked: argparse.Namespace, plan: dict[str, Any], runs: list[Run], peaks: list[dict[str, float]]
) -> dict[str, str]:
    supervised = _rates(asked, runs, lambda run: run.supervised)
    real = _rates(asked, runs, lambda run: run.tokens)
    padded = _rates(asked, runs, lambda run: run.padded)
    steps = plan["steps"]
    # Mean FLOPs per real token, which is the same with packing, although its steps differ. A shared
    # prefix counts once.
    needed = sum(step["flops"] for step in steps) / sum(step["tokens"] for step in steps)
    rates = zip(map(min, real, padded), peaks, strict=False)
    share = [rate * needed / peak[asked.precision] for rate, peak in rates]
    counted = asked.steps - asked.warm_up
    values = {
        "supervised tokens/s": f"{median(supervised):,.1f}",
        "least to most": f"{min(supervised):,.1f} to {max(supervised):,.1f}",
        "real tokens/s": f"{median(real):,.1f}",
        "run tokens/s": f"{median(padded):,.1f}",
        "s a step": f"{median(_seconds(asked, run) / counted for run in runs):.4f}",
        "peak RSS, MiB": f"{max(run.rss for run in runs) / 1024:,.0f}",
        "MFU, %": f"{100 * median(share):.2f}",
        "loss, step 1": f"{runs[0].losses[0]:.6f}",
    }
    gpu = [run.gpu for run in runs if run.gpu is not None]
    return values | ({"GPU, MiB": f"{max(gpu):,}"} if gpu else {})


def _heading(
    asked: argparse.Namespace,
    plan: dict[str, Any],
    peaks: list[dict[str, float]],
    loads: list[float],
) -> list[str]:
    gemm = ", ".join(
        f"{kind} {median(peak[kind] for peak in peaks) / 1e9:,.0f}" for kind in ("fp32", "bf16")
    )
    shape = {"decoder": "SmolLM2-135M", "t5": "a random T5 of Flan-T5-small's shape"}
    model = shape.get(asked.model, f"a random {asked.model}")
    steps = plan["steps"]
    each = sum(step["tokens"] for step in steps) / len(steps) / asked.batch
    supervised = sum(s["supervised"] for s in steps) / sum(s["tokens"] for s in steps)
    return [
        f"{datetime.date.today()}, {_device()}, {asked.threads} threads, load {min(loads):.1f} to "
        f"{max(loads):.1f}; GEMM peak in GFLOP/s, median of the turns: {gemm}. {_versions(asked)}.",
        "",
        f"{'A tiny random model' if asked.tiny else model}, {asked.kind}, r 8 on query and value, "
        f"{asked.precision}, data {Path(asked.data).name}: {asked.batch} examples a step, "
        f"{each:.0f} tokens each, {supervised:.0%} of them supervised, at most "
        f"{asked.model_max_length} tokens; {plan['plan']}. {asked.runs} runs in turns, of "
        f"{asked.steps} steps, the first {asked.warm_up} not counted; medians of the runs."
        + (f" Further flags: {' '.join(asked.loop_flags)}." if asked.loop_flags else ""),
    ]


def _notes(
    asked: argparse.Namespace, runs: dict[str, list[Run]], failures: dict[str, str]
) -> list[str]:
    notes = [
        "All systems train on the same ids and labels in the same order, encoded once by this "
        "project. Ratios are of supervised tokens/s. Run tokens count padding; this project and "
        "the bare loop stop each dialogue at the token that predicts its last supervised one. MFU: "
        "FLOPs of these tokens (4 per frozen weight, logits of supervised tokens only, half of "
        "causal attention's square) against the GEMM peak of the same turn and precision.",
    ]
    if runs.get("bare") and runs.get("loop"):
        bare, ours = (_undisturbed(asked, runs[name]) for name in ("bare", "loop"))
        notes.append(
            f"Fastest of {asked.runs} runs for each step, which removes most of the noise of other "
            f"work on the machine: {bare:.2f} s for the bare loop's steps, {ours:.2f} s for this "
            f"project's, {100 * (ours / bare - 1):+.1f} %."
        )
    if "fastchat" in asked.systems and asked.model != "t5":
        notes.append(
            f"FastChat pads every dialogue to --model_max_length ({asked.model_max_length}). Its "
            "weights are fp32; bf16 is autocast only."
        )
    if asked.model == "t5":
        notes.append(
            "T5's own dropout is on, so FastChat's first loss is only close to the others."
        )
    if "trl_packed" in asked.systems:
        notes.append(f"Packing: a step is one row of at most {asked.packed_length} tokens.")
    notes += [f"{NAMES[name]} did not run: {words}" for name, words in failures.items()]
    return [f"- {note}" for note in notes]


def _seconds(asked: argparse.Namespace, run: Run) -> float:
    """Return the time of the steps after the warm-up."""
    return float(run.ends[-1] - run.ends[asked.warm_up - 1])


def _undisturbed(asked: argparse.Namespace, runs: list[Run]) -> float:
    """Return the seconds of the counted steps, each step from its fastest run."""
    steps = [[b - a for a, b in pairwise(run.ends[asked.warm_up - 1 :])] for run in runs]
    return sum(map(min, zip(*steps, strict=True)))


def _rates(
    asked: argparse.Namespace, runs: list[Run], of: Callable[[Run], list[int]]
) -> list[float]:
    return [sum(of(run)[asked.warm_up :]) / _seconds(asked, run) for run in runs]


def _rate(asked: argparse.Namespace, runs: list[Run]) -> float | None:
    return median(_rates(asked, runs, lambda run: run.supervised)) if runs else None


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _versions(asked: argparse.Namespace) -> str:
    ours = ("torch", "transformers", "peft", "accelerate")
    found = [f"{name} {importlib.metadata.version(name)}" for name in ours]
    text = f"Python {platform.python_version()}, {', '.join(found)}"
    if {"trl", "trl_packed"} & {*asked.systems}:
        text += f"; TRL {PACKAGES['trl'][0].partition('==')[2]}"
    if "fastchat" in asked.systems:
        text += f"; FastChat: {', '.join(PACKAGES['fastchat'][:4]).replace('==', ' ')}"
    return text


def _device() -> str:
    """Return the name of the GPU, or of the CPU if there is none."""

    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        facts = Path("/proc/cpuinfo").read_text().partition("model name")[2]
        return facts.partition(":")[2].partition("\n")[0].strip() or platform.machine()
