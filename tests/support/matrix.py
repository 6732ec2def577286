"""Trains a model under every backend, for tests that compare backends."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.helpers import launch, prompt_of

EXACT = ["--mixed_precision", "no", "--lora_dropout", "0", "--learning_rate", "1e-2"]
# Accelerate config, processes, examples per micro-batch. A window has four examples. Each of two
# ranks runs two, in one or two micro-batches. The third window of an epoch has fewer examples.
BACKENDS = {
    "one": ("cpu", 1, 4),
    "ddp": ("ddp", 2, 1),
    "zero1": ("zero1", 2, 2),
    "zero2": ("zero2", 2, 1),
    "zero3": ("zero3", 2, 2),
}
TOLERANCE = {"LoRA": 1e-5, "QLoRA": 1e-3}
# A user's DeepSpeed file. By default, ZeRO-3 does not partition such small parameters; with
# threshold 0 it does.
SHARE_ALL = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": "auto",
    },
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "bf16": {"enabled": "auto"},
}
Log = list[dict[str, Any]]
Train = Callable[..., Path]


def share_all_file(folder: Path) -> Path:
    file = folder / "share_all.json"
    file.write_text(json.dumps(SHARE_ALL))
    return file


def trainings(folder: Path, model: Path, data: Path, flags: dict[str, list[str]]) -> Train:
    """Return a function that trains each combination once and returns its output folder.

    Every run has eight steps and the same global batch. flags: further flags by kind.
    """
    share_all = share_all_file(folder)
    done: dict[str, Path] = {}

    def train(kind: str, backend: str, *more: str | Path) -> Path:
        name = "-".join([kind, backend, *map(str, more[:2])]).replace("/", "_")
        if name not in done:
            config, processes, per_device = BACKENDS[backend]
            given = [*EXACT, "--q_lora", str(kind == "QLoRA"), *flags[kind], *more]
            if backend == "zero3" and not more:
                # The recomputation gathers the weights again that ZeRO-3 has partitioned.
                given += ["--deepspeed", share_all, "--gradient_checkpointing", "True"]
            launch(
                config,
                folder / name,
                *("--model_name_or_path", model, "--data_path", data),
                *("--global_batch_size", "4", "--per_device_train_batch_size", str(per_device)),
                *("--max_steps", "8", "--logging_steps", "1", "--save_steps", "4", *given),
                processes=processes,
                script="tests/support/probed_train.py",
            )
            done[name] = folder / name
        return done[name]

    return train


def held(output: Path) -> list[dict[str, dict[str, int]]]:
    """Return the bytes of weights that each rank holds, as probed_train.py records them."""
    files = sorted(output.glob("held-*.json"))
    return [json.loads(file.read_text()) for file in files]


def log_in(output: Path) -> Log:
    log: Log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return log


def logits_of(model: Path, adapter: Path, four_bit: bool) -> tuple[Tensor, Tensor]:
    """Return the logits of the base model, and of the base model with the adapter in peft."""
    from loop.model.quantization import four_bit as settings

    quantised = {"quantization_config": settings(torch.float32)} if four_bit else {}
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    pairs = AutoConfig.from_pretrained(model).is_encoder_decoder
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    base = loader.from_pretrained(model, dtype=torch.float32, **quantised).train()
    inputs = prompt_of(base.config)
    with torch.no_grad():
        before = base(**inputs).logits
        after = PeftModel.from_pretrained(base, adapter).train()(**inputs).logits
    return before, after
