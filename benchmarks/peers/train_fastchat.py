"""Trains the benchmark's plan with FastChat's train_lora or train_lora_t5, in its own environment.

python benchmarks/peers/train_fastchat.py SETTINGS.json

benchmarks/step/measure.py writes the settings and starts this file. FastChat's code runs unchanged,
with three exceptions. Ids and labels are those of the plan, padded like FastChat's, so that all
systems train on the same tokens. The order is kept. Steps are timed. The file is not named
fastchat.py, because its folder is first on sys.path and the file would hide the package.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# FastChat always imports these packages. LoRA on one device uses neither.
STUBS = (
    *("deepspeed", "deepspeed.zero", "deepspeed.runtime", "deepspeed.runtime.zero"),
    *("deepspeed.runtime.zero.partition_parameters", "flash_attn"),
    *("flash_attn.flash_attn_interface", "flash_attn.bert_padding"),
)


def main(settings: str) -> None:
    """Train on the plan's examples, in its order."""
    asked = json.loads(Path(settings).read_text())
    for name in STUBS:
        sys.modules[name] = _stub(name)
    import torch
    from step_timer import Steps, timed

    if asked["pairs"]:
        from fastchat.train import train_lora_t5 as train_lora
    else:
        from fastchat.train import train_lora

    plan = json.loads(Path(asked["plan"]).read_text())["steps"]
    rows = [example for step in plan for example in step["examples"]]
    steps = Steps()
    train_lora.Trainer = timed(train_lora.Trainer, steps)
    make = _pairs if asked["pairs"] else _padded
    train_lora.make_supervised_data_module = lambda tokenizer, data_args: make(
        rows, tokenizer, asked["max_length"]
    )
    sys.argv = ["train_lora.py", *_flags(asked, len(plan), torch.cuda.is_available())]
    train_lora.train()
    steps.write(asked["out"])


def _padded(rows: list[Any], tokenizer: Any, longest: int) -> dict[str, Any]:
    """Return every dialogue padded to model_max_length, like FastChat's `preprocess`."""
    import torch

    examples = []
    for ids, labels in rows:
        pads = longest - len(ids)
        padded = {
            "input_ids": [*ids, *[tokenizer.pad_token_id] * pads],
            "labels": [*labels, *[-100] * pads],
            "attention_mask": [1] * len(ids) + [0] * pads,
        }
        examples.append({name: torch.tensor(values) for name, values in padded.items()})
    return {"train_dataset": examples, "eval_dataset": None}


def _pairs(rows: list[Any], tokenizer: Any, _: int) -> dict[str, Any]:
    """Return the pairs, and the collator of FastChat's T5, which pads to the longest."""
    from fastchat.train.train_flant5 import DataCollatorForSupervisedDataset

    pairs = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    collator = DataCollatorForSupervisedDataset(tokenizer=tokenizer)
    return {"train_dataset": pairs, "eval_dataset": None, "data_collator": collator}


def _flags(asked: dict[str, Any], steps: int, gpu: bool) -> list[str]:
    values = {
        "model_name_or_path": asked["fastchat_model"],
        "data_path": "the plan's",
        "output_dir": asked["folder"],
        "max_steps": steps,
        "per_device_train_batch_size": asked["batch"],
        "model_max_length": asked["max_length"],
        "learning_rate": asked["learning_rate"],
        "lr_scheduler_type": "cosine",
        "warmup_steps": asked["warmup_steps"],
        "lora_dropout": asked["dropout"],
        "q_lora": asked["kind"] == "qlora",
        "bf16": asked["precision"] == "bf16",
        "use_cpu": not gpu,
        "seed": asked["seed"],
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _stub(name: str) -> ModuleType:
    """Return a module that has every attribute, with a spec but no file."""

    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []
    module.__version__ = "0"
    module.__getattr__ = lambda attribute: _missing(name, attribute)  # type: ignore[method-assign]
    return module


def _missing(name: str, attribute: str) -> Any:
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return sys.modules.get(f"{name}.{attribute}", object())


if __name__ == "__main__":
    main(*sys.argv[1:])
