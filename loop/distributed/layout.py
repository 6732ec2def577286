"""Plans the layout: how a window is split into ranks x micro-batches x examples."""

from dataclasses import dataclass, replace
from math import ceil
from typing import Protocol

import torch

from data.batching.balance import Limits
from data.errors import UserError
from loop.config.flags import Config


@dataclass(frozen=True)
class Layout:
    """The split of a window over ranks and micro-batches; it does not change the gradient."""

    rank: int
    world_size: int
    micro_batch_size: int  # examples in a micro-batch, at most
    accumulation: int  # micro-batches of a rank in a full window; a token limit may add more
    global_batch_size: int  # examples in a full window, over all ranks
    steps_per_epoch: int
    total_steps: int
    limits: Limits = Limits(8)
    chunk_tokens: int = 0  # of the loss: see supervised_loss_sum

    @property
    def divisor(self) -> int:
        """The gradient accumulation given to accelerate, which divides each loss by this number.

        `loss_scale` undoes the division. The number is at least 2, because a window may have more
        micro-batches than `accumulation` (a token limit, `check_model`): with 1, DeepSpeed's
        offload would not sum gradients over micro-batches (0.19.8, zero/stage_1_and_2.py).
        """
        return max(self.accumulation, 2)

    def interval(self, strategy: str, steps: int) -> int:
        """Return the steps between two logs, checkpoints or evaluations.

        strategy: "steps", "epoch" or "no"; for "no" the interval is longer than the run.

        >>> layout = Layout(0, 1, 2, 1, 2, steps_per_epoch=5, total_steps=20)
        >>> [layout.interval(strategy, 8) for strategy in ("steps", "epoch", "no")]
        [8, 5, 21]
        """
        return {"steps": steps, "epoch": self.steps_per_epoch, "no": self.total_steps + 1}[strategy]

    def __str__(self) -> str:
        tokens = f" or {self.limits.tokens} tokens" if self.limits.tokens else ""
        how = "in one row without padding" if self.limits.packed else "padded"
        return (
            f"{self.total_steps} steps, {self.steps_per_epoch} an epoch, of "
            f"{self.global_batch_size} examples: {_plural(self.world_size, 'rank')} x "
            f"{_plural(self.accumulation, 'micro-batch')} of at most {self.micro_batch_size}"
            f"{tokens}, {how}"
        )


class Ranks(Protocol):
    """The two fields of accelerate's PartialState that a layout needs."""

    @property
    def process_index(self) -> int: ...

    @property
    def num_processes(self) -> int: ...


def plan_layout(config: Config, examples: int, ranks: Ranks, packed: bool = False) -> Layout:
    """Split the global batch over ranks and micro-batches; an epoch's last window may be shorter.

    Raises UserError if the only step of the run is a warm-up step.
    """
    world_size, per_device = ranks.num_processes, config.per_device_train_batch_size
    # A window is at most an epoch, so that no rank runs empty micro-batches.
    batch = min(global_batch_size(config, world_size), examples)
    accumulation = ceil(batch / (world_size * per_device))
    per_device = min(per_device, ceil(batch / world_size))
    per_epoch = ceil(examples / batch)
    steps = config.max_steps if config.max_steps > 0 else ceil(config.num_train_epochs * per_epoch)
    if steps == 1 and config.warmup_ratio > 0 and config.lr_scheduler_type != "constant":
        raise UserError(
            f"found one step, which is warm-up with learning rate 0 (--warmup_ratio "
            f"{config.warmup_ratio:g}); expected more. Give --warmup_ratio 0, or train longer."
        )
    # --auto_micro_batch starts with one example of the maximum length (auto_micro_batch.py).
    tokens = config.model_max_length if config.auto_micro_batch else config.tokens_per_micro_batch
    split = (ranks.process_index, world_size, per_device, accumulation)
    limits, chunk = Limits(per_device, tokens), config.loss_chunk_tokens
    layout = Layout(*split, batch, per_epoch, steps, limits, chunk)
    # FlashAttention-2 needs queries and keys at the same positions.
    return batched(layout, packed, sharing=packed and not config.flash_attn)


def batched(layout: Layout, packed: bool, sharing: bool, alone: bool = False) -> Layout:
    """Return the layout with micro-batches of this form; alone: one example in each."""
    # On a CPU only: the cost of an additional micro-batch on a GPU is not measured.
    finer = not packed and not torch.cuda.is_available()
    size, accumulation = layout.micro_batch_size, layout.accumulation
    if alone:
        size, accumulation = 1, ceil(layout.global_batch_size / layout.world_size)
    form = {"packed": packed, "finer": finer, "sharing": sharing}
    limits = replace(layout.limits, examples=size, **form)
    return replace(layout, micro_batch_size=size, accumulation=accumulation, limits=limits)


def global_batch_size(config: Config, world_size: int) -> int:
    """Return the examples of a full window: the flag, or ranks x accumulation x micro-batch."""
    accumulation = config.gradient_accumulation_steps or 1
    per_rank = accumulation * config.per_device_train_batch_size
    return config.global_batch_size or world_size * per_rank


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "es" if noun.endswith("ch") else "s")
