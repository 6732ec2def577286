"""What makes a CPU train quicker: cheap dropout, memory that is kept, bf16 where it is faster."""

import ctypes
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

LEVELS = 1 << 16  # A probability is rounded to a multiple of one part of these.


class Dropout(nn.Dropout):
    """torch.nn.Dropout, but that `p` is rounded to 2^-16; the seed is torch's, on a CPU alone."""

    def forward(self, values: Tensor) -> Tensor:
        """Return the values with some set to 0 and the others scaled up, in any shape and dtype."""
        dropped = round(self.p * LEVELS)
        if not self.training or not dropped or dropped == LEVELS:
            return super().forward(values)
        kept: Tensor = _Kept.apply(values, dropped)  # type: ignore[no-untyped-call]
        return kept


class _Kept(Function):
    # Only which are kept is saved, a byte each; torch 2.13 saves a factor in the values' dtype.
    @staticmethod
    def forward(ctx: Any, values: Tensor, dropped: int) -> Tensor:
        # torch draws its numbers on one thread, whatever their width.
        draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = draws.view(torch.int16)[: values.numel()].view(values.shape)
        kept = bits >= dropped - LEVELS // 2
        ctx.save_for_backward(kept)
        ctx.scale = LEVELS / (LEVELS - dropped)
        return (values * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def replace_dropout(model: nn.Module) -> None:
    """Put this dropout in place of all of a model's; it takes half of the time of PyTorch's own."""
    for parent in [*model.modules()]:
        for name, child in [*parent._modules.items()]:  # one under two names, too
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p).train(child.training))


def keep_memory() -> None:
    """Have the C library keep what is freed: a step asks for the same again, 4 KiB at a time.

    Numbers of glibc's malloc.h. Given back, it costs a page fault and zeroes for each page.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, -1)  # never
        # glibc 2.33 takes 32 MiB at most, and the line above has ended its own choice.
        if not libc.mallopt(mmap_threshold, 1 << 30):
            libc.mallopt(mmap_threshold, 32 << 20)


def bf16_speedup(tokens: int = 256, width: int = 576, inner: int = 1536) -> float:
    """Return how many times as fast one core's bf16 matrix products are as its fp32 ones.

    The shapes are those of an MLP layer of SmolLM2-135M. One thread's CPU time is compared, which
    other processes hardly change. It takes about 0.1 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for attempt in range(8):
        for dtype in seconds:
            left, right = torch.ones(tokens, width).to(dtype), torch.ones(width, inner).to(dtype)
            start = time.thread_time()
            torch.mm(left, right)
            if attempt:  # The first product builds its kernel.
                seconds[dtype] = min(seconds[dtype], time.thread_time() - start)
    torch.set_num_threads(threads)
    return seconds[torch.float32] / seconds[torch.bfloat16]
