"""Profiles a step by kind of operation: with padding and all logits, and as in this project.

python benchmarks/step/profile_step.py [fp32|bf16] [flags of loop/train.py]
"""

import functools
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from data.batching.collate import Collator, MicroBatch
from loop.config.flags import Config
from loop.config.load import read_config
from loop.inputs.training_data import read_training_data
from loop.model.dtypes import torch_dtype
from loop.model.kernels import keep_memory, replace_dropout
from loop.model.load import leave_inputs
from loop.model.packed_attention import implementation, row_inputs
from loop.training.loss import supervised_loss_sum

STEPS, BATCH = 4, 8
# An operation belongs to the first kind with a word that is in the operation's name.
KINDS = {
    "matrix products": ("mm",),
    "attention": ("attention", "softmax"),
    "dropout masks": ("bernoulli", "random"),
    "loss after the LM head": ("nll", "logsumexp", "exp_", "scatter", "gather", "sub"),
    "copies and casts": ("copy", "clone", "cat", "index", "fill"),
    "norms, activations, rotations": ("mul", "add", "silu", "pow", "rsqrt", "mean", "neg", "div"),
}


def main(precision: str = "fp32", *flags: str) -> None:
    """Profile both after one warm-up step, and print a Markdown table."""
    prepared = read_training_data(read_config(flags, Config))
    order = np.random.default_rng(0).permutation(len(prepared.examples))
    chosen = [
        [prepared.examples[int(i)] for i in order[n : n + BATCH]] for n in range(0, 40, BATCH)
    ]
    pad = prepared.base.tokenizer.pad_token_id
    row = Collator(pad, None, functools.partial(row_inputs, flash=False), sharing=True)
    variants = {
        "padded, all logits": (False, Collator(pad), all_logits),
        "this project": (True, row, supervised_loss_sum),
    }
    found = {}
    for name, (ours, collator, loss_sum) in variants.items():
        model = adapted(prepared.base.name, ours, torch_dtype(precision))
        batches = [collator(part, 0) for part in chosen]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss_sum(model, batches[0]).backward()
            found[name] = profiled(model, batches[1:], loss_sum)
    print(f"| {precision}, seconds a step | " + " | ".join(found) + " |\n|---|---|---|")
    for kind in [*KINDS, "other", "total, unprofiled"]:
        print(f"| {kind} | " + " | ".join(f"{one[kind]:.2f}" for one in found.values()) + " |")


def adapted(base: str, ours: bool, dtype: torch.dtype) -> Any:
    """Return the base model with LoRA on q_proj and v_proj; ours: use this project's kernels."""
    attention = implementation(ours, False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation=attention)
    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    with_adapter = get_peft_model(model, adapter).train()
    if ours:
        leave_inputs(with_adapter)
        replace_dropout(with_adapter)
        keep_memory()
    return with_adapter


def all_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Return the loss sum like most trainers, with the logits of all positions and padding."""
    logits = model(**batch.model_inputs, use_cache=False).logits
    return cross_entropy(
        logits.flatten(0, 1).float().index_select(0, batch.positions),
        batch.targets,
        reduction="sum",
    )


def profiled(model: Any, batches: list[MicroBatch], loss_sum: Any) -> Counter[str]:
    """Return the seconds per step by kind."""

    started = time.perf_counter()
    for batch in batches:
        loss_sum(model, batch).backward()
    seconds = Counter({"total, unprofiled": (time.perf_counter() - started) / len(batches)})
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            loss_sum(model, batch).backward()
    for event in profiler.key_averages():
        kinds = (kind for kind, words in KINDS.items() if any(word in event.key for word in words))
        seconds[next(kinds, "other")] += event.self_cpu_time_total / 1e6 / len(batches)
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
