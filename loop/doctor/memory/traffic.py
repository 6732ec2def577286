"""Bytes that one rank sends each step: formulas over a model's shape (docs/scaling.md)."""

from loop.doctor.memory.estimate import REUSE, live, sharded
from loop.doctor.memory.run import Run


def sent(run: Run) -> float:
    """Return the bytes one rank sends each step, with rings.

    Gathering or scattering n bytes sends n (W - 1) / W of them, an all-reduce twice that. ZeRO-1
    and 2 reduce by all-reduce (deepspeed 0.19, stage_1_and_2.py: use_multi_rank_bucket_allreduce).
    """
    ring = (run.world - 1) / run.world
    if run.backend.stage == 0:
        return ring * 2 * 4 * run.adapter
    if run.backend.stage == 1:
        return ring * (2 * 4 + run.width) * run.adapter
    if run.backend.stage == 2:
        return ring * (2 * 4 * run.micro_batches + run.width) * run.adapter
    each = 4 * run.adapter + run.width * fetched(run)
    return ring * (run.micro_batches * each + run.width * run.whole)


def fetched(run: Run) -> int:
    """Return the elements that ZeRO-3 gathers for one micro-batch: forward, then backward.

    What is live at the turn comes once. A checkpointed layer too large for REUSE comes thrice.
    """
    total = sum(sharded(run, run.shape.model, run.shape.trained))
    layer = sum(sharded(run, run.shape.layer))
    again = run.shape.layers * max(0, layer - REUSE // 2)
    return 2 * total - live(run) + (again if run.config.gradient_checkpointing else 0)
