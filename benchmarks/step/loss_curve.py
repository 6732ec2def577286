"""Compares the losses of this project and of TRL's SFTTrainer, step by step.

python benchmarks/step/loss_curve.py [--steps 50] [--most 1e-4] [flags of run.py]

Both start from the same adapter, and train on the same tokens in the same order. Both use fp32, no
dropout, cosine after a warm-up of 3 %, AdamW, and clipping at 1. Exits with 1 if the losses of a
step differ by more than --most.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from benchmarks.step.measure import STEP, checked, run_system
from benchmarks.step.run import parse, prepared

FLAGS = ("--systems", "loop", "trl", "--dropout", "0", "--learning_rate", "1e-3")


def main() -> None:
    """Train with both, and print a table of their losses."""

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", default="50")
    parser.add_argument(
        "--most", type=float, default=1e-4, help="maximum difference of the losses of a step"
    )
    mine, others = parser.parse_known_args()
    asked = parse([*FLAGS, "--steps", mine.steps, *others])
    with tempfile.TemporaryDirectory(prefix="loss-curve-") as name:
        job = prepared(asked, asked.work or Path(name))
        adapter = str(job.folder / "adapter")
        bare = [sys.executable, str(STEP / "bare_loop.py"), "adapter", adapter]
        checked([*bare, *job.flags])
        job = replace(job, adapter=adapter)
        losses = [run_system(system, job, job.folder / system).losses for system in asked.systems]
    print("| step | this project | TRL | apart |\n| --- | --- | --- | --- |")
    apart = [abs(ours - theirs) for ours, theirs in zip(*losses, strict=True)]
    for step, (ours, theirs) in enumerate(zip(*losses, strict=True), start=1):
        print(f"| {step} | {ours:.6f} | {theirs:.6f} | {apart[step - 1]:.1e} |")
    worst = max(apart)
    print(f"\nat most {worst:.1e} apart, at step {1 + apart.index(worst)} of {len(apart)}")
    if not worst <= mine.most:
        sys.exit(f"found losses {worst:.1e} apart; expected at most {mine.most:g}")


if __name__ == "__main__":
    main()
