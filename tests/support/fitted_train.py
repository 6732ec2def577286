"""Runs loop/train.py with simulated memory per rank; for test_auto_micro_batch_zero3.

Environment variable ROOM: for each rank, the tokens of the largest pass that fits in memory. If a
number is negative, the first larger pass runs out of memory in its middle. Passes are real. The
state of DeepSpeed's engine is checked before the first step.
"""

import os
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from loop import train
from loop.distributed.signals import run_and_exit
from loop.training import auto_micro_batch

PER_TOKEN = 1000  # bytes
real_pass, fit_once = auto_micro_batch._forward_backward, train.fit_micro_batch
tried: list[int] = []


def mine() -> int:
    return int(os.environ["ROOM"].split()[int(os.environ["RANK"])])


def measured(model: Any, batch: Any, *rest: Any) -> None:
    """Run a pass; if memory runs out, fail in its middle, while other ranks wait in collectives."""
    tried.append(batch.tokens)
    hooks = []
    if mine() < 0 and batch.tokens > -mine():

        def end(*_: Any) -> None:
            raise torch.OutOfMemoryError("found no memory")

        layers = [m for n, m in model.named_modules() if n.endswith("layers.1")]
        hooks = [layer.register_forward_pre_hook(end) for layer in layers]
    try:
        real_pass(model, batch, *rest)
    finally:
        for hook in hooks:
            hook.remove()


def checked(layout: Any, config: Any, prepared: Any, model: Any, *rest: Any) -> Any:
    """Fit the micro-batch, then check that DeepSpeed's engine is unchanged."""
    found = fit_once(layout, config, prepared, model, *rest)
    print(f"tried on rank {os.environ['RANK']}: {tried}", flush=True)
    zero = model.optimizer
    assert not zero.grad_partitions_flat_buffer.any()
    assert zero.averaged_gradients == {}
    assert (zero.micro_step_id, model.micro_steps, model.global_steps) == (0, 0, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


if __name__ == "__main__":
    auto_micro_batch.memory_room = lambda _: PER_TOKEN * (mine() if mine() > 0 else 10**9)
    auto_micro_batch.memory_used = lambda _: 0
    # The simulated peak of a pass is proportional to its tokens.
    peak_of = auto_micro_batch._peak_of

    def peak(*arguments: Any) -> int:
        peak_of(*arguments)
        return PER_TOKEN * tried[-1]

    auto_micro_batch._forward_backward, auto_micro_batch._peak_of, train.fit_micro_batch = (
        measured,
        peak,
        checked,
    )
    run_and_exit(train.main)
