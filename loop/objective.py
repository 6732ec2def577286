"""The loss: a sum over supervised tokens, and the scale that makes it the window's mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.collate import MicroBatch


def supervised_loss_sum(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the summed cross-entropy of the supervised tokens, a scalar in fp32.

    The LM head runs on supervised positions only: logits [S, V] in place of [B, T, V].
    """
    torch.manual_seed(micro_batch.seed)
    with _head_sees(model, micro_batch.positions):
        logits = model(**micro_batch.model_inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float(), micro_batch.targets, reduction="sum")


def loss_scale(accelerator: Accelerator, supervised_tokens: int) -> float:
    """Return the factor that turns loss sums into the gradient of the window's mean loss.

    `backward` divides by the accumulation (accelerate 1.15: accelerator.py, or DeepSpeed's
    engine), and averaging gradients over ranks divides by the world size. Both are undone; what
    is left is one division by the supervised tokens of the whole window, over all ranks.
    """
    undone: int = accelerator.num_processes * accelerator.gradient_accumulation_steps
    return undone / supervised_tokens


@contextmanager
def _head_sees(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Let the LM head see hidden states [B, T, H] at the flat `positions` [S] only."""
    wrapped: Any = getattr(model, "module", model)  # DistributedDataParallel, DeepSpeedEngine

    def select(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0].flatten(0, 1).index_select(0, positions),)

    handle = wrapped.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
