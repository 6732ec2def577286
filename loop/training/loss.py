"""Computes the summed loss of supervised tokens, and the factor for the mean of a window."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.batching.collate import MicroBatch

# Configuration keys of models that alter the logits of their LM head (transformers 5.23).
AFTERWARDS = (
    *("final_logit_softcapping", "logits_scaling", "logit_scale", "unpadded_vocab_size"),
    *("logit_softcap", "output_multiplier", "lm_head_multiplier", "logits_soft_cap"),
)
# Sub-configurations of composite models that may hold these keys (Gemma 3, T5Gemma).
PARTS = ("text_config", "decoder")
# Instead of a number of tokens: for models whose head cannot run on some positions only.
ALL_LOGITS = -1


def supervised_loss_sum(
    model: nn.Module, micro_batch: MicroBatch, chunk_tokens: int = 1024
) -> Tensor:
    """Return the summed cross-entropy of the supervised tokens, a scalar in fp32.

    The LM head runs on supervised positions only, `chunk_tokens` at a time, so logits are [C, V]
    instead of [B, T, V]. It runs on all supervised positions at once if `chunk_tokens` is 0, or if
    the model does not allow chunks (see `_in_chunks`). With ALL_LOGITS it runs on all positions.
    """
    torch.manual_seed(micro_batch.seed)
    if chunk_tokens == ALL_LOGITS:
        return _cross_entropy(logits_at_positions(model, micro_batch), micro_batch.targets)
    wrapped: Any = getattr(model, "module", model)  # DistributedDataParallel, DeepSpeedEngine
    head = wrapped.get_output_embeddings()
    if chunk_tokens and _in_chunks(head, wrapped):

        def loss_of(hidden: Tensor) -> Any:
            return _loss_of(head, hidden, micro_batch.targets, chunk_tokens)

        with _in_place_of_logits(head, micro_batch.positions, loss_of):
            loss: Tensor = model(**micro_batch.model_inputs, use_cache=False).logits
        return loss.float()
    with _head_at_positions(head, micro_batch.positions):
        logits = model(**micro_batch.model_inputs, use_cache=False).logits
    return _cross_entropy(logits, micro_batch.targets)


def hidden_states(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the LM head's inputs at the supervised positions, [S, H] fp32.

    Raises LookupError if the model does not call its output embeddings once.
    """
    wrapped: Any = getattr(model, "module", model)
    head, kept = wrapped.get_output_embeddings(), list[Tensor]()

    def keep(_head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0].float())

    if head is None:
        raise LookupError("the model has no output embeddings")
    with _head_at_positions(head, micro_batch.positions):
        handle = head.register_forward_pre_hook(keep)
        try:
            model(**micro_batch.model_inputs, use_cache=False)
        finally:
            handle.remove()
    if len(kept) != 1:
        raise LookupError(f"the model calls its output embeddings {len(kept)} times")
    return kept[0]


def logits_at_positions(model: nn.Module, micro_batch: MicroBatch) -> Tensor:
    """Return the model's logits at the supervised positions, [S, V]; all logits are computed."""
    logits: Tensor = model(**micro_batch.model_inputs, use_cache=False).logits
    return _selected(logits, micro_batch.positions)


def token_losses(
    model: nn.Module, micro_batch: MicroBatch, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """Return the loss and the predicted id of each supervised token: [S] fp32, [S] int64.

    For evaluation, without gradients. The LM head runs as in training, so the losses are the same.
    """
    wrapped: Any = getattr(model, "module", model)
    head = wrapped.get_output_embeddings()
    found: list[tuple[Tensor, Tensor]] = []
    if chunk_tokens == ALL_LOGITS:
        return _compared(logits_at_positions(model, micro_batch), micro_batch.targets)
    if not chunk_tokens or not _in_chunks(head, wrapped):
        with _head_at_positions(head, micro_batch.positions):
            logits = model(**micro_batch.model_inputs, use_cache=False).logits
        return _compared(logits, micro_batch.targets)

    def compare(hidden: Tensor) -> None:
        both = hidden, micro_batch.targets
        chunks = zip(*(torch.split(x, chunk_tokens) for x in both), strict=True)
        found.extend(_compared(head.forward(states), wanted) for states, wanted in chunks)

    with _in_place_of_logits(head, micro_batch.positions, compare):
        model(**micro_batch.model_inputs, use_cache=False)
    losses, predicted = zip(*found, strict=True)
    return torch.cat(losses), torch.cat(predicted)


def _compared(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses, logits.argmax(-1)


def loss_scale(accelerator: Accelerator, supervised_tokens: int) -> float:
    """Return the factor that turns loss sums into the gradient of the window's mean loss.

    `backward` divides by the gradient accumulation steps (accelerate 1.15: accelerator.py, or
    DeepSpeed's engine). Averaging gradients over ranks divides by the world size. The factor undoes
    both, and divides once by the window's supervised tokens over all ranks.
    """
    undone: int = accelerator.num_processes * accelerator.gradient_accumulation_steps
    return undone / supervised_tokens


class _FrozenHead(torch.autograd.Function):
    """The loss sum of hidden states [S, H] through a frozen head [V, H], a chunk at a time.

    The forward pass computes the gradient of the hidden states, so no logits are kept. The
    backward pass does not use the weights, which ZeRO-3 would have to gather.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, size: int
    ) -> Tensor:
        gradient = torch.zeros_like(hidden)
        loss = torch.zeros((), device=hidden.device)
        chunks = zip(*(torch.split(x, size) for x in (hidden, targets, gradient)), strict=True)
        for states, wanted, slot in chunks:
            logits = nn.functional.linear(states, weight, bias).float()
            log_sum = torch.logsumexp(logits, -1, keepdim=True)
            places = wanted[:, None]
            loss += (log_sum - logits.gather(1, places)).sum()
            probabilities = logits.sub_(log_sum).exp_()
            probabilities.scatter_add_(1, places, -torch.ones_like(log_sum))
            slot.copy_(probabilities.to(weight.dtype) @ weight)
            del logits, probabilities  # free them before the next chunk
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0]).to(gradient.dtype), None, None, None, None


def changes_logits(config: Any) -> bool:
    """Return whether a model's configuration has a key that alters its LM head's logits."""
    parts = [config, *(getattr(config, part, None) for part in PARTS)]
    return any(getattr(part, name, None) for part in parts for name in AFTERWARDS)


def _in_chunks(head: Any, model: Any) -> bool:
    """Return whether the loss can be computed in chunks.

    The model must not alter its head's logits. In fp16 the gradient would underflow, since the loss
    scale is applied later. Under ZeRO-3, a head with trained parameters would need its weights
    again in the backward pass.
    """
    parameters = [*head.parameters()]
    return (
        not changes_logits(model.config)
        and getattr(model, "final_logits_bias", None) is None  # BART's and Marian's
        and parameters[0].dtype != torch.float16
        and (_is_frozen(head) or not hasattr(parameters[0], "ds_id"))
    )


def _is_frozen(head: Any) -> bool:
    return type(head) is nn.Linear and not any(p.requires_grad for p in head.parameters())


def _loss_of(head: Any, hidden: Tensor, targets: Tensor, size: int) -> Any:
    """Return the loss sum of hidden states [S, H] through the LM head, a chunk at a time."""
    if _is_frozen(head):
        apply: Any = _FrozenHead.apply
        return apply(hidden, head.weight, head.bias, targets, size)
    chunks = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    sums = [
        checkpoint(lambda h, t: _cross_entropy(head.forward(h), t), *chunk, use_reentrant=False)
        for chunk in chunks
    ]
    return torch.stack(sums).sum()


@contextmanager
def _in_place_of_logits(
    head: nn.Module, positions: Tensor, compute: Callable[[Tensor], Any]
) -> Iterator[None]:
    """Make the LM head return `compute(hidden states [S, H])` instead of logits.

    The hook runs before DeepSpeed's own, which releases ZeRO-3's gathered weights.
    """
    kept: list[Tensor] = []

    def select(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        kept.append(_selected(inputs[0], positions))
        return (kept[0][:0],)

    def replace(_head: Any, _inputs: Any, _logits: Tensor) -> Any:
        return compute(kept.pop())

    before = head.register_forward_pre_hook(select)
    handles = before, head.register_forward_hook(replace, prepend=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _head_at_positions(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Run the LM head on hidden states [B, T, H] at the flat `positions` [S] only."""

    def select(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (_selected(inputs[0], positions),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def _selected(hidden: Tensor, positions: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, positions)
