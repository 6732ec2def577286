"""Trains the benchmark's plan with TRL's SFTTrainer, in TRL's own environment.

python benchmarks/peers/train_trl.py SETTINGS.json

benchmarks/step/measure.py writes the settings and starts this file. The file is not named trl.py,
because its folder is first on sys.path and the file would hide the package.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from step_timer import Steps, timed
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main(settings: str) -> None:
    """Train on the plan's examples, in its order."""
    asked = json.loads(Path(settings).read_text())
    plan = json.loads(Path(asked["plan"]).read_text())["steps"]
    rows = [
        {"input_ids": ids, "labels": labels} for step in plan for ids, labels in step["examples"]
    ]
    # The Trainer splits the list into steps of equal size. If the last window of an epoch has fewer
    # examples, all later steps are shifted. So run.py and loss_curve.py refuse such a plan.
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    steps = Steps()
    model, adapter = _model(asked)
    trainer = timed(SFTTrainer, steps)(
        model=model,
        args=_config(asked, len(plan)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    trainer.train()
    steps.write(asked["out"])


def _model(asked: dict[str, Any]) -> tuple[Any, LoraConfig | None]:
    """Return the base model and the adapter that TRL adds, or the model with a given adapter."""
    dtype = torch.bfloat16 if asked["precision"] == "bf16" else torch.float32
    options: dict[str, Any] = {}
    if asked["kind"] == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if torch.cuda.is_available():
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype, **options)
    if asked["adapter"]:
        return PeftModel.from_pretrained(model, asked["adapter"], is_trainable=True), None
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=asked["dropout"],
        target_modules=["q_proj", "v_proj"],
    )
    return model, lora


def _config(asked: dict[str, Any], steps: int) -> SFTConfig:
    packing = asked["packing"]
    return SFTConfig(
        output_dir=asked["folder"],
        max_steps=steps,
        per_device_train_batch_size=1 if packing else asked["batch"],
        packing=packing,
        # With packing, a step is one row with about as many tokens as an unpacked step.
        max_length=asked["packed_length"] if packing else asked["max_length"],
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=asked["warmup_steps"],
        max_grad_norm=1.0,
        weight_decay=0.0,
        bf16=asked["precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=asked["seed"],
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
