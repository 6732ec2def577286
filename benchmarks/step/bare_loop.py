"""A bare PyTorch loop, the reference for the overhead of this project.

python benchmarks/step/bare_loop.py plan|train|adapter OUT --flag value ...

The flags are those of loop/train.py. `plan` writes the examples of each step. `train` trains
without accelerate, and without logging between steps. `adapter` writes the initial adapter.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from data.encoding.encode import Example
from loop.config.flags import Config
from loop.config.load import read_config
from loop.distributed.accelerator import build_accelerator, check_launch, init_process_group_once
from loop.distributed.layout import Layout, plan_layout
from loop.inputs.training_data import TrainingData, read_training_data
from loop.inputs.windows import Window, windows
from loop.model.load import load_model
from loop.training.loss import supervised_loss_sum
from loop.training.optim import lr_at


@dataclass(frozen=True)
class Job:
    """Settings, data and layout of one run."""

    config: Config
    prepared: TrainingData
    layout: Layout


def main(what: str, out: str, *flags: str) -> None:
    """Write the plan, the trained run's log, or the initial adapter."""
    job = job_of(flags)
    if what == "adapter":
        _model(job)[0].save_pretrained(out)
        return
    Path(out).write_text(json.dumps({"plan": plan, "train": train}[what](job)))


def job_of(flags: Sequence[str]) -> Job:
    """Read flags and data as loop/train.py does."""
    ranks = init_process_group_once()
    config = read_config(flags, Config)
    check_launch(config)
    prepared = read_training_data(config)
    return Job(
        config, prepared, plan_layout(config, len(prepared.examples), ranks, prepared.base.packed)
    )


def train(job: Job) -> dict[str, Any]:
    """Train; return each step's end, in seconds, and its mean loss per supervised token."""
    config, layout = job.config, job.layout
    step = bare_step(job)
    ends, losses = [], []
    for window in windows(job.prepared.examples, layout, config.seed, job.prepared.collator):
        losses.append(step(window))
        if losses[-1].is_cuda:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return {"ends": ends, "losses": [loss.item() for loss in losses]}


def bare_step(job: Job) -> Callable[[Window], torch.Tensor]:
    """Load the model; return a function that trains on a window and returns its mean loss."""
    config, layout = job.config, job.layout
    model, device = _model(job)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(trained, config.learning_rate, weight_decay=decay, fused=True)
    bf16 = config.precision == "bf16"
    model.train()

    def step(window: Window) -> torch.Tensor:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(window.step, layout.total_steps, config)
        loss_sum = torch.zeros((), device=device)
        for micro_batch in window.micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                micro_loss_sum = supervised_loss_sum(
                    model, micro_batch.to(device), config.loss_chunk_tokens
                )
            (micro_loss_sum / window.supervised_tokens).backward()
            loss_sum += micro_loss_sum.detach()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        return loss_sum / window.supervised_tokens

    return step


def plan(job: Job) -> dict[str, Any]:
    """Return for each step the ids and labels of its examples, token counts, and FLOPs."""
    dealt: list[Example] = []
    collator = job.prepared.collator

    def recorded(examples: Sequence[Example], *rest: Any) -> Any:
        dealt.extend(examples)
        return collator(examples, *rest)

    needed = flops_of(job.prepared.base.config)
    steps = []
    for window in windows(job.prepared.examples, job.layout, job.config.seed, recorded):
        padded = sum(
            micro_batch.model_inputs[side].numel()
            for micro_batch in window.micro_batches
            for side in ("input_ids", "decoder_input_ids")
            if side in micro_batch.model_inputs
        )
        # Windows are collated in order, maybe ahead of use. So this window has the first examples.
        chosen, dealt[:] = dealt[: window.examples], dealt[window.examples :]
        assert sum(example.run_tokens for example in chosen) == window.tokens
        steps.append(
            {
                "examples": [[[*e.input_ids], [*e.labels]] for e in chosen],
                "tokens": sum(example.tokens for example in chosen),
                "supervised": window.supervised_tokens,
                "padded": padded,
                "flops": sum(needed(example) for example in chosen),
            }
        )
    return {"steps": steps, "plan": str(job.layout), "data": str(job.prepared)}


def flops_of(base_config: Any) -> Callable[[Example], float]:
    """Return a function for the FLOPs of an example: forward and backward of the frozen model.

    Frozen weights have no gradient, so backward costs as much as forward. Padding and the logits of
    unsupervised tokens are not counted. Causal attention counts as half of its square. The
    adapter's FLOPs, below 1 %, are left out.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    pairs = base_config.is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    with torch.device("meta"):
        model = loader.from_config(base_config)
    head = model.get_output_embeddings()
    sides = [0, 0]  # weights applied to each token of the dialogue or source, and of the target
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            crosses = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
            sides[name.startswith("decoder.") and not crosses] += module.weight.numel()
    layers = base_config.num_hidden_layers
    heads = base_config.num_attention_heads
    width = heads * getattr(base_config, "d_kv", 0) or heads * (
        getattr(base_config, "head_dim", None) or base_config.hidden_size // heads
    )

    def needed(example: Example) -> float:
        first, second = example.lengths
        squares = 2 * first * first + second * second + 2 * first * second if pairs else first**2
        linear = sides[0] * first + sides[1] * second
        logits = head.weight.numel() * example.supervised_tokens
        return float(4 * (linear + logits) + 6 * layers * width * squares)

    return needed


def _model(job: Job) -> tuple[Any, torch.device]:
    """Return the model that this project trains, before accelerator.prepare, on the device."""

    accelerator = build_accelerator(job.config, job.layout)
    model = load_model(job.prepared.base, job.config, accelerator)
    return model.to(accelerator.device), accelerator.device


if __name__ == "__main__":
    main(*sys.argv[1:])
