"""Runs loop/train.py and writes `trace-<rank>.jsonl`: the micro-batches in training order.

A window has one line, with its step and the ids of each micro-batch. Each begun micro-batch adds
one line.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from loop import train
from loop.distributed.signals import run_and_exit

all_windows, loss_sum = train.windows, train.supervised_loss_sum
prefetched = train.prefetched
seen: dict[int, list[list[str]]] = {}  # by step, filled by the prefetch thread
lines: list[Any] = []


def write_line(**line: Any) -> None:
    lines[0].write(json.dumps(line) + "\n")


def traced_windows(
    examples: Any, layout: Any, seed: int, collate: Any, *more: Any
) -> Iterator[Any]:
    collated: list[list[str]] = []

    def recorded(part: Any, *rest: Any) -> Any:
        collated.append([example.id for example in part])
        return collate(part, *rest)

    output = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    lines.append(open(output / f"trace-{layout.rank}.jsonl", "a", buffering=1))  # noqa: SIM115
    for window in all_windows(examples, layout, seed, recorded, *more):
        seen[window.step] = [*collated]
        collated.clear()
        yield window


def traced_ahead(items: Iterator[Any]) -> Iterator[Any]:
    for window in prefetched(items):
        write_line(step=window.step, ids=seen.pop(window.step))
        yield window


def traced_loss_sum(*arguments: Any) -> Any:
    write_line(begun=True)
    return loss_sum(*arguments)


if __name__ == "__main__":
    train.windows, train.supervised_loss_sum = traced_windows, traced_loss_sum
    train.prefetched = traced_ahead
    run_and_exit(train.main)
