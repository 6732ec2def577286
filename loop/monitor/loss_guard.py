"""Steps that go wrong: without a finite gradient no update is made; such steps are named."""

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

NAMED = 16  # ids of a bad step's samples that are told
# A spike: so many standard deviations over the mean of so many logs, and by this share of it.
DEVIATIONS, LOGS, SHARE = 4.0, 20, 0.1


def skip_if_bad(accelerator: Accelerator, optimizer: Any, loss_sum: Tensor, norm: Any) -> Any:
    """Return whether any rank's loss or gradient is not finite, [] bool; there is then no update.

    Before the optimizer's step, on all ranks; None before a window's last micro-batch. Nobody waits
    for a GPU: fused AdamW leaves weights, moments and count as they are where `found_inf` is 1
    (torch 2.13, optim/adam.py). DeepSpeed has made its step by then, or has found the gradient's
    norm not finite and left it out (0.19.8, zero/stage_1_and_2.py and stage3.py). fp16's gradients
    are its loss scale's, so only the loss counts.
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
    """Keeps which steps were bad until somebody asks: to ask a GPU is to wait for it."""

    def __init__(self, most: int, in_a_row: int) -> None:
        self.most, self.in_a_row = most, in_a_row
        self.waiting: list[tuple[int, Tensor, int, Sequence[str]]] = []

    def add(self, step: int, bad: Tensor, supervised_tokens: int, ids: Sequence[str]) -> None:
        """Note a step."""
        self.waiting.append((step, bad, supervised_tokens, ids))

    def ask(self) -> tuple[int, int]:
        """Return how many of the steps noted were bad, and their tokens; the first rank names them.

        Raises Fault after too many in a row; on every rank alike.
        """
        steps = tokens = 0
        flags = torch.stack([bad for _, bad, _, _ in self.waiting]).tolist() if self.waiting else []
        for (step, _, count, ids), bad in zip(self.waiting, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if not bad:
                continue
            steps, tokens = steps + 1, tokens + count
            if ids:
                more = ", …" if len(ids) > NAMED else ""
                tqdm.write(
                    f"step {step}: the loss or the gradient is not finite; no update is made. "
                    f"Samples: {', '.join(ids[:NAMED])}{more}"
                )
            if self.in_a_row >= self.most:
                fault = RunError(
                    f"step {step}: {self.in_a_row} steps in a row had a loss or a gradient that is "
                    "not finite, --max_nonfinite_steps allows no more. Their updates were "
                    "left out, and checkpoints are whole. Look at the samples named above; lower "
                    "the learning rate, or train in bf16 or fp32 if this is fp16."
                )
                fault.known_to_all = True
                raise fault
        self.waiting = []
        return steps, tokens


def spike(history: Sequence[dict[str, Any]], loss: float) -> str | None:
    """Return a warning where a loss stands far above those logged before it.

    >>> calm = [{"loss": 2.0 + 0.01 * (n % 2)} for n in range(20)]
    >>> spike(calm, 2.1), spike(calm, 3.0)
    (None, 'the loss, 3.0000, is far above the 2.0050 of the last 20 logs')
    """
    before = [entry["loss"] for entry in history if entry.get("loss") is not None][-LOGS:]
    if len(before) < LOGS // 2:
        return None
    usual = mean(before)
    if loss <= usual + max(DEVIATIONS * pstdev(before), SHARE * math.fabs(usual)):
        return None
    return f"the loss, {loss:.4f}, is far above the {usual:.4f} of the last {len(before)} logs"
