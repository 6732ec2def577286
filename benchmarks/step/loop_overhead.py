"""Measures the time that the loop adds to a bare PyTorch loop, step by step, in one process.

python benchmarks/step/loop_overhead.py [--steps 200] [--model decoder|narrow] [-- --flag value ...]

Both loops train their own model on the same windows. They alternate after each step, and also
alternate in who is first, so a slow phase of the machine slows both. Words after -- are flags of
loop/train.py.

The loop's time begins with a window and ends with the request for the next window. It includes the
collation, because there is no prefetch thread. The bare loop gets the collated window.

`narrow` is a random model with SmolLM2-135M's 30 layers and hidden size 64. The overhead does not
depend on the width, and is easier to measure with short steps.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

import loop.train
from benchmarks.step.bare_loop import Job, bare_step, job_of
from benchmarks.step.inputs import write_model
from loop.config.flags import DUMMY_DATA
from loop.inputs.windows import Window

WARM_UP_PAIRS = 5  # pairs of steps that are not counted


@dataclass
class Turns:
    """Seconds of each step of both loops, and the losses of the bare loop."""

    bare: list[float] = field(default_factory=list)
    loop: list[float] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)

    def take(self, job: Job) -> Iterator[Window]:
        """Yield each window to the loop, and train the bare loop's model on it before or after.

        It replaces `prefetched` of windows.py, whose thread would run during both steps.
        """
        step = bare_step(job)

        def bare(window: Window) -> None:
            begun = time.perf_counter()
            self.losses.append(step(window))
            if self.losses[-1].is_cuda:
                torch.cuda.synchronize()
            self.bare.append(time.perf_counter() - begun)

        collated = loop.train.windows(
            job.prepared.examples, job.layout, job.config.seed, job.prepared.collator
        )
        while True:
            begun = time.perf_counter()
            window = next(collated, None)
            collating = time.perf_counter() - begun
            if window is None:
                return
            first = window.step % 2 == 0
            if first:
                bare(window)
            begun = time.perf_counter()
            yield window
            self.loop.append(collating + time.perf_counter() - begun)
            if not first:
                bare(window)


def main() -> None:
    """Measure, and print the medians and the overhead."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--model", choices=("decoder", "narrow", "tiny"), default="decoder")
    asked, further = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    with tempfile.TemporaryDirectory(prefix="loop-overhead-") as name:
        folder = Path(name)
        tiny = asked.model == "tiny"
        write_model("decoder" if tiny else asked.model, f"{folder}/model", "-", "tiny" * tiny)
        flags = [
            *("--model_name_or_path", f"{folder}/model", "--output_dir", f"{folder}/run"),
            *("--max_steps", str(asked.steps), "--save_strategy", "no", "--logging_steps", "1"),
            *("--per_device_train_batch_size", "8", "--global_batch_size", "8"),
            *("--data_path", str(DUMMY_DATA)),
            *further,
        ]
        turns = measure(flags)
        log = (folder / "run/metrics.jsonl").read_text().splitlines()
    difference = max(
        abs(json.loads(line)["loss"] - loss.item())
        for line, loss in zip(log, turns.losses, strict=True)
    )
    print(summary(turns, f"{asked.model} {' '.join(further)}", difference))


def measure(flags: list[str]) -> Turns:
    """Train with the loop, and with the bare loop between its steps."""
    turns, job = Turns(), job_of(flags)
    loop.train.prefetched = lambda _dealt: turns.take(job)  # type: ignore[assignment]
    sys.argv = ["loop/train.py", *flags]
    loop.train.main()
    return turns


def summary(turns: Turns, what: str, difference: float) -> str:
    """Return the result in one line; difference: the largest difference of the losses."""
    bare, ours = turns.bare[WARM_UP_PAIRS:], turns.loop[WARM_UP_PAIRS:]
    added = sorted(b - a for a, b in zip(bare, ours, strict=True))
    ratio = sorted(b / a for a, b in zip(bare, ours, strict=True))
    # The 95 % interval of the median by order statistics is n/2 +- 0.98 sqrt(n).
    reach = int(0.98 * len(added) ** 0.5)
    low, high = len(added) // 2 - reach, min(len(added) - 1, len(added) // 2 + reach)
    median = statistics.median
    return (
        f"{what}: {len(added)} pairs of steps, {os.cpu_count()} threads. Medians: bare "
        f"{1e3 * median(bare):.1f} ms, loop {1e3 * median(ours):.1f} ms; of the pairs the loop "
        f"adds {1e3 * median(added):+.2f} ms ({1e3 * added[low]:+.2f} to {1e3 * added[high]:+.2f})"
        f", {100 * median(ratio) - 100:+.2f} % ({100 * ratio[low] - 100:+.2f} to "
        f"{100 * ratio[high] - 100:+.2f}), 95 % intervals. Losses at most {difference:.1e} apart."
    )


if __name__ == "__main__":
    main()
