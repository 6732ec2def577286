"""Skips steps with a non-finite loss or gradient, and warns of loss spikes."""

import math
from collections.abc import Sequence
from statistics import mean, pstdev
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.errors import RunError
from loop.distributed.optimizer_state import adamw

MAX_IDS_SHOWN = 16  # ids of examples, for one non-finite step
# A loss is a spike if it exceeds the mean of the last logged losses by this many standard
# deviations and by this share of the mean.
SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_WINDOW_LOGS = 4.0, 0.1, 20


def skip_if_bad(accelerator: Accelerator, optimizer: Any, loss_sum: Tensor, norm: Any) -> Any:
    """Skip the optimizer step if the loss or gradient of any rank is not finite.

    Every rank must call this before the optimizer step. Returns a bool tensor of shape [], true for
    a non-finite step, or None before a window's last micro-batch.
    This does not synchronise with the GPU: with `found_inf` = 1, fused AdamW changes no weight,
    moment or step count (torch 2.13, optim/adam.py). DeepSpeed has already stepped, or has skipped
    a step with a non-finite norm (0.19.8, zero/stage_1_and_2.py and stage3.py). In fp16 only the
    loss is checked, since the loss scaler checks the gradients.
    """
    if not accelerator.sync_gradients:
        return None
    fp16 = accelerator.mixed_precision == "fp16"
    bad = ~torch.isfinite(loss_sum)
    if not fp16:
        bad = bad | ~torch.isfinite(torch.as_tensor(norm, device=loss_sum.device))
    if accelerator.num_processes > 1:
        bad = accelerator.reduce(bad.float(), reduction="sum") > 0
    if accelerator.state.deepspeed_plugin is None and not fp16:
        inner: Any = adamw(optimizer)
        inner.found_inf = bad.float()
    return bad


class Watch:
    """Collects the steps' non-finite flags on the device, since reading them waits for the GPU.

    limit: the number of non-finite steps in a row that ends the run. in_a_row: non-finite steps in
    a row just before this launch.
    """

    def __init__(self, limit: int, in_a_row: int) -> None:
        self.limit, self.in_a_row = limit, in_a_row
        self.unread: list[tuple[int, Tensor, int, Sequence[str]]] = []

    def add(self, step: int, bad: Tensor, supervised_tokens: int, ids: Sequence[str]) -> None:
        """Add a step's flag, its supervised tokens, and on rank 0 the ids of its examples."""
        self.unread.append((step, bad, supervised_tokens, ids))

    def read(self) -> tuple[int, int]:
        """Return the counts of non-finite steps and their supervised tokens since the last call.

        Rank 0 prints the ids of their examples. Raises RunError on every rank after `limit` such
        steps in a row.
        """
        steps = tokens = 0
        flags = torch.stack([bad for _, bad, _, _ in self.unread]).tolist() if self.unread else []
        for (step, _, count, ids), bad in zip(self.unread, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if not bad:
                continue
            steps, tokens = steps + 1, tokens + count
            if ids:
                more = ", …" if len(ids) > MAX_IDS_SHOWN else ""
                tqdm.write(
                    f"step {step}: the loss or the gradient is not finite; the step is skipped. "
                    f"Examples: {', '.join(ids[:MAX_IDS_SHOWN])}{more}"
                )
            if self.in_a_row >= self.limit:
                error = RunError(
                    f"step {step}: {self.in_a_row} steps in a row had a non-finite loss or "
                    f"gradient; expected fewer than {self.limit} (--max_nonfinite_steps). Their "
                    "updates were skipped, and the checkpoints are intact. Check the examples "
                    "listed above; lower the learning rate, or train in bf16 or fp32 if this is "
                    "fp16."
                )
                error.known_to_all = True
                raise error
        self.unread = []
        return steps, tokens


def spike(history: Sequence[dict[str, Any]], loss: float) -> str | None:
    """Return a warning if a loss is far above the losses logged before it.

    >>> calm = [{"loss": 2.0 + 0.01 * (n % 2)} for n in range(20)]
    >>> spike(calm, 2.1), spike(calm, 3.0)
    (None, 'the loss 3.0000 is far above 2.0050, the mean of the last 20 logs')
    """
    losses = [entry["loss"] for entry in history if entry.get("loss") is not None]
    before = losses[-SPIKE_WINDOW_LOGS:]
    if len(before) < SPIKE_WINDOW_LOGS // 2:
        return None
    usual = mean(before)
    if loss <= usual + max(SPIKE_DEVIATIONS * pstdev(before), SPIKE_SHARE * math.fabs(usual)):
        return None
    return f"the loss {loss:.4f} is far above {usual:.4f}, the mean of the last {len(before)} logs"
