"""loop/train.py, which also leaves `trace-<rank>.jsonl`: what it trains on, and when.

One line a window with its step and the ids of each micro-batch, one line a micro-batch begun.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from loop import train, windows
from loop.leave import run_and_exit

collate, all_windows, loss_sum = windows.collate, train.windows, train.supervised_loss_sum
seen: list[list[str]] = []
lines: list[Any] = []


def tell(**line: Any) -> None:
    lines[0].write(json.dumps(line) + "\n")


def noted_collate(examples: Any, *more: Any) -> Any:
    seen.append([example.id for example in examples])
    return collate(examples, *more)


def traced_windows(examples: Any, layout: Any, *more: Any) -> Iterator[Any]:
    output = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    lines.append(open(output / f"trace-{layout.rank}.jsonl", "a", buffering=1))  # noqa: SIM115
    for window in all_windows(examples, layout, *more):
        tell(step=window.step, ids=[*seen])
        seen.clear()
        yield window


def traced_loss_sum(*arguments: Any) -> Any:
    tell(begun=True)
    return loss_sum(*arguments)


if __name__ == "__main__":
    windows.collate, train.windows = noted_collate, traced_windows
    train.supervised_loss_sum = traced_loss_sum
    run_and_exit(train.main)
