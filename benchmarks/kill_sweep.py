"""Kills runs at random instants, resumes them, and compares them with an uninterrupted run.

python benchmarks/kill_sweep.py [--kills 200] [--seed 0]
"""

import argparse
import collections
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests.support.helpers import kill_everything, log_of, start, write_dialogues

BACKENDS = {
    "one process": ("cpu", 1),
    "DDP x 2": ("ddp", 2),
    "ZeRO-2 x 2": ("zero2", 2),
    "ZeRO-3 x 2": ("zero3", 2),
}
STEPS, SAVE_STEPS, ACCUMULATION = 60, 4, 2
FLAGS = [
    *("--global_batch_size", "4", "--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS)),
    *("--logging_steps", "3", "--learning_rate", "1e-2", "--lora_dropout", "0.1"),
    *("--mixed_precision", "no"),
]


@dataclass
class Sweep:
    """Number of kills by phase of the run, and differences from the uninterrupted run."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    differences: list[str] = field(default_factory=list)


def begin(backend: str, output: Path, given: list[str]) -> subprocess.Popen[bytes]:
    """Start or resume a run."""
    config, processes = BACKENDS[backend]
    per_device = 4 // processes // ACCUMULATION
    output.mkdir(exist_ok=True)
    return start(
        *("accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml"),
        *("--num_processes", str(processes), "--main_process_port", "0"),
        "tests/support/traced_train.py",
        *("--output_dir", output, "--per_device_train_batch_size", str(per_device)),
        *(*FLAGS, *given),
        log=output.with_suffix(".log"),
    )


def trace(output: Path, rank: int = 0) -> list[str]:
    """Return the complete lines of a rank's trace."""
    file = output / f"trace-{rank}.jsonl"
    return file.read_text().split("\n")[:-1] if file.is_file() else []


def samples(output: Path, ranks: int) -> dict[tuple[int, int], set[str]]:
    """Return the example ids by (rank, step); two entries in a set mean that a resume differed."""
    found: dict[tuple[int, int], set[str]] = collections.defaultdict(set)
    for rank in range(ranks):
        for line in map(json.loads, trace(output, rank)):
            if "step" in line:
                found[rank, line["step"]].add(json.dumps(line["ids"]))
    return dict(found)


def saving(output: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any(output.glob(".checkpoint-*.partial"))


def kill_once(backend: str, output: Path, given: list[str], step_seconds: float) -> str | None:
    """Resume the run, kill it, and return its phase; None if it finished before the kill."""
    before = len(trace(output))
    launched = begin(backend, output, given)
    while launched.poll() is None and len(trace(output)) == before:
        time.sleep(0.01)
    in_save = random.random() < 0.3
    deadline = time.monotonic() + random.uniform(0, 3 * SAVE_STEPS) * step_seconds
    while launched.poll() is None:
        if in_save and saving(output):
            time.sleep(random.uniform(0, 0.01))
            break
        if not in_save and time.monotonic() > deadline:
            break
        time.sleep(0.0005)
    else:
        return None
    kill_everything(launched)
    if saving(output):
        return "during a save"
    begun = 0
    for line in reversed(trace(output)):
        if "step" in json.loads(line):
            break
        begun += 1
    return "in mid-window" if 0 < begun < ACCUMULATION else "elsewhere in a step"


def sweep(backend: str, kills: int, folder: Path, given: list[str]) -> Sweep:
    """Kill runs `kills` times in total; compare each finished run with an uninterrupted one."""
    found = Sweep()
    reference = folder / "reference"
    if begin(backend, reference, given).wait():
        raise RuntimeError(reference.with_suffix(".log").read_text())
    log = log_of(reference)
    step_seconds = log[-1]["seconds"] / STEPS
    run = 0
    while found.kills.total() < kills:
        output, run = folder / f"killed-{run}", run + 1
        while found.kills.total() < kills:
            doing = kill_once(backend, output, given, step_seconds)
            if doing is None:
                break
            found.kills[doing] += 1
        if begin(backend, output, given).wait():
            text = output.with_suffix(".log").read_text()
            found.differences.append(f"{output}: did not finish: {text[-2000:]}")
            continue
        found.differences += compare(output, reference, BACKENDS[backend][1])
    return found


def compare(output: Path, reference: Path, ranks: int) -> list[str]:
    """Return the differences between two finished runs in samples, losses and adapter."""
    adapters = [
        hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest()
        for run in (output, reference)
    ]
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm", "supervised_tokens")
    logs = [[[e[key] for key in keys] for e in log_of(run)] for run in (output, reference)]
    parts = {
        "samples": samples(output, ranks) == samples(reference, ranks),
        "losses": logs[0] == logs[1],
        "adapter": adapters[0] == adapters[1],
    }
    return [f"{output}: {name} differ" for name, same in parts.items() if not same]


def main() -> int:
    """Sweep every backend and print the table."""

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    random.seed(asked.seed)
    from transformers import AutoTokenizer

    from loop.model.bundled_model import embedded_model
    from tests.conftest import make_tiny_model, small_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = small_tokenizer(AutoTokenizer.from_pretrained(embedded_model()))
        model = make_tiny_model(folder / "model", tokenizer, False)
        data = write_dialogues(folder / "data.json", *dialogues())
        given = ["--model_name_or_path", str(model), "--data_path", str(data)]
        differences = []
        print(f"{'':14}{'kills':>6}  during a save  in mid-window  elsewhere  differences")
        for backend in BACKENDS:
            place = folder / backend.replace(" ", "_")
            place.mkdir()
            found = sweep(backend, asked.kills // len(BACKENDS), place, given)
            counts = [found.kills[k] for k in ("during a save", "in mid-window")]
            rest = found.kills.total() - sum(counts)
            row = f"{found.kills.total():>6}  {counts[0]:>13}  {counts[1]:>13}  {rest:>9}"
            print(f"{backend:14}{row}  {len(found.differences):>11}", flush=True)
            differences += found.differences
    print("\n".join(differences) or "Every run equals the uninterrupted run, bit for bit.")
    return bool(differences)


def dialogues() -> list[list[str]]:
    """Return ten dialogues of very different lengths."""
    return [["What is " + "very " * (3 * n) + "long?", "No " + "idea. " * n] for n in range(10)]


if __name__ == "__main__":
    sys.exit(main())
