"""Checks the training loss of one example against a plain forward pass, before step 1."""

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from data.batching.collate import Collator
from data.encoding.encode import IGNORE_INDEX, Example
from data.errors import UserError
from loop.config.flags import Config
from loop.distributed.accelerator import broadcast_flag, raise_on_all_ranks
from loop.inputs.training_data import TrainingData
from loop.training.evaluation import evaluating
from loop.training.loss import supervised_loss_sum

SAMPLED = 256  # the shortest of so many examples is compared
# Tolerances of a mean loss for rounding: relative above a loss of 1, absolute below. HEAD is for
# equal hidden states, whose logits are equal with and without chunks, also in 16 bits.
FP32, HEAD = 1e-4, 1e-3
# In 16 bits and TF32, another attention kernel rounds the hidden states differently. This changes a
# token's logits by several 2^-8 of their size, and an example may have few tokens to average over.
# Measured with SmolLM2-135M in bf16: a difference of 0.02 at a loss of 0.64.
SIXTEEN_BIT = 1e-1


def check_loss(
    data: TrainingData, model: nn.Module, config: Config, accelerator: Accelerator
) -> None:
    """Compare the losses of a short example; every rank must call this after `prepare`.

    Training runs the LM head on supervised positions only, and packs examples into rows. The loss
    would be wrong for a model that alters its logits by a setting that loss.py does not support.
    The model's mode, its weights and the random state do not change.
    Raises UserError on all ranks if the losses of rank 0 differ.
    """
    with raise_on_all_ranks():
        example = _shortest(data.examples[:SAMPLED])
    device, collator, chunk = accelerator.device, data.collator, config.loss_chunk_tokens
    # Compiling takes half a minute, and the check does not concern compiled code.
    eager = torch.compiler.set_stance("force_eager") if config.torch_compile else nullcontext()
    seeded = torch.random.fork_rng([device] if device.type == "cuda" else [])
    rough = FP32 if config.precision == "no" and not config.tf32 else SIXTEEN_BIT
    sharp = min(rough, HEAD)

    def run(collate: Collator, chunk_tokens: int) -> float:
        batch = collate([example], 0).to(device)
        return supervised_loss_sum(model, batch, chunk_tokens).item() / len(batch.targets)

    with eager, seeded, evaluating(model):
        plain = _plain_loss(model, example, collator, device)
        found, whole = run(collator, chunk), run(collator, 0)
        if _close(found, whole, sharp) and _close(found, plain, rough):
            return
        remedy = "No flag corrects this. Give another model."
        if _close(whole, plain, rough):
            remedy = "Give --loss_chunk_tokens 0: then the model computes its logits itself."
        elif _close(run(dataclasses.replace(collator, row_inputs=None), 0), plain, rough):
            remedy = "Give --packing False --loss_chunk_tokens 0."
    error = UserError(
        f"{data.base.name}: found a training loss of {found:.6g} for the example {example.id}; "
        f"expected {plain:.6g}, from the logits of the {data.base.config.model_type} model itself. "
        f"{remedy}"
    )
    error.known_to_all = True
    raise error


def _shortest(examples: Sequence[Example]) -> Example:
    return min(examples, key=lambda example: example.run_tokens)


def _plain_loss(
    model: nn.Module, example: Example, collator: Collator, device: torch.device
) -> float:
    """Return the mean loss of the supervised tokens, from a plain forward pass's logits."""
    inputs, labels = {"input_ids": example.input_ids}, [*example.labels[1:], IGNORE_INDEX]
    if example.is_pair:
        labels = example.labels
        inputs["decoder_input_ids"] = [collator.decoder_start_id or 0, *labels[:-1]]
    tensors = {name: torch.tensor([ids], device=device) for name, ids in inputs.items()}
    logits = model(**tensors, use_cache=False).logits[0].float()
    return nn.functional.cross_entropy(logits, torch.tensor(labels, device=device)).item()


def _close(found: float, expected: float, tolerance: float) -> bool:
    """Return whether two losses are equal within the tolerance, as rank 0 decides.

    All ranks must run the same passes, which are collectives under ZeRO-3. A non-finite expected
    loss passes: the run itself detects it and prints the examples (loss_guard.py).
    """
    close = abs(found - expected) <= tolerance * max(expected, 1.0)
    return broadcast_flag(close or not math.isfinite(expected))
