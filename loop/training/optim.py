"""AdamW over the trainable parameters, and the learning rate as a pure function of the step."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import ceil, cos, pi
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from loop.config.flags import Config


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return PyTorch's fused AdamW; biases have no weight decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable if not name.endswith("bias")]},
        {"params": [p for name, p in trainable if name.endswith("bias")], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr, decay = config.learning_rate, config.weight_decay
    return torch.optim.AdamW(groups, lr=lr, weight_decay=decay, fused=True)


def lr_at(step: int, total_steps: int, config: Config) -> float:
    """Return the learning rate of the step with index `step`, counted from 0.

    Equal to transformers' schedules of the same names (optimization.py). The warm-up takes
    ceil(warmup_ratio x total_steps) steps.
    """
    shape = config.lr_scheduler_type
    warmup = 0 if shape == "constant" else ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    factor = {"cosine": 0.5 * (1 + cos(pi * done)), "linear": 1 - done}.get(shape, 1.0)
    return config.learning_rate * max(0.0, factor)


def set_learning_rate(optimizer: Any, learning_rate: float) -> float:
    """Write the learning rate into every group, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


@contextmanager
def accumulating(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Run the block as one micro-batch of a window.

    Only the last one reduces gradients and enables the optimizer step.
    accelerate's own `accumulate` expects the same number of micro-batches in every window.
    """
    accelerator.sync_gradients = last
    with nullcontext() if last else accelerator.no_sync(model):
        yield


def clip_gradients(accelerator: Accelerator, optimizer: Any, max_norm: float) -> Any:
    """Clip the window's gradient and return its norm before clipping, a number or a tensor [].

    Returns None before the window's last micro-batch. DeepSpeed clips in its backward pass, with
    the limit from loop/distributed/deepspeed_config.py, and only returns the norm.
    """
    if not accelerator.sync_gradients:
        return None
    # Frozen parameters are left out: looping over them takes 3 ms for 30 layers.
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    return accelerator.clip_grad_norm_(trained, max_norm or float("inf"))
