"""Runs loop/train.py, then examines the trained model while all ranks hold it; for test_matrix.py.

Writes these files into the output folder:
    logits.safetensors: the logits of the trained model.
    held-<rank>.json: the bytes of weights that the rank holds.
    shards/, with --save_non_lora_state all: the base model in several files.
    trainable/, with --save_non_lora_state all: the other trained weights.
"""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file

from loop import train
from loop.checkpoint.full_model import save_non_lora
from loop.distributed.signals import run_and_exit
from tests.support.helpers import allocated, prompt_of

load_model, save_run = train.load_model, train.save_run
loading = {"held": 0}


def bytes_held(parameters: list[Any]) -> dict[str, int]:
    """Return the unpartitioned bytes of these weights, and the bytes that this rank holds."""
    whole = held = 0
    for parameter in parameters:
        size = parameter.element_size()
        whole += getattr(parameter, "ds_numel", parameter.numel()) * size
        held += parameter.data.numel() * size
        if hasattr(parameter, "ds_tensor") and parameter.data.numel() <= 1:
            held += parameter.ds_tensor.numel() * size
    return {"whole": whole, "held": held}


def private_memory() -> int:
    """Return the anonymous memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def watched_load(*arguments: Any) -> Any:
    """Load the model and record the peak of private memory."""
    before, done = private_memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            loading["held"] = max(loading["held"], private_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        return load_model(*arguments)
    finally:
        done.set()
        watcher.join()


def probed(accelerator: Any, model: Any, prepared: Any, *rest: Any) -> None:
    """Save the run, then write the logits and the bytes that this rank holds."""
    folder = Path(rest[-1].output_dir)
    inner = accelerator.unwrap_model(model)
    base = [p for p in inner.parameters() if not p.requires_grad]
    four_bit = [p for p in base if getattr(p, "quant_state", None) is not None]
    held = {"four_bit": bytes_held(four_bit), "base": bytes_held(base)}
    held["fp32"] = bytes_held([p for p in base if p.dtype == torch.float32])
    with allocated() as saving:
        save_run(accelerator, model, prepared, *rest)
    held["loading"] = loading | {"whole": held["base"]["whole"]}
    held["saving"] = {"held": saving.most, "whole": held["base"]["whole"]}
    (folder / f"held-{accelerator.process_index}.json").write_text(json.dumps(held))
    if rest[-1].save_non_lora_state == "all":
        for name in ("shards", "trainable"):
            (folder / name).mkdir(exist_ok=True)
        trainable = replace(rest[-1], save_non_lora_state="trainable")
        save_non_lora(accelerator, inner, folder / "shards", rest[-1], shard=50_000)
        save_non_lora(accelerator, inner, folder / "trainable", trainable)
    # The model is in training mode, with dropout 0. In eval mode, bitsandbytes 0.50 multiplies in
    # bf16 on CPUs with bf16 instructions (nn/modules.py, Linear4bit).
    with torch.no_grad():
        logits = inner(**prompt_of(inner.config)).logits
    if accelerator.is_main_process:
        save_file({"logits": logits.float().cpu().contiguous()}, folder / "logits.safetensors")


if __name__ == "__main__":
    train.load_model, train.save_run = watched_load, probed
    run_and_exit(train.main)
