"""What a run is made of, in hashes: a resumed run must be made of the same."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from loop.config.flags import PATHS, TOLD, Config
from loop.inputs.training_data import Prepared
from loop.model.base import tokenizer_sha256

SAMPLE = 1 << 16  # bytes
GROUPS_THAT_TRAIN = ("model", "LoRA", "data", "training")
# How the work is split: it changes the last digits only. Precision is compared as a whole.
SPLIT = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size"),
    *(
        "tokens_per_micro_batch",
        "auto_micro_batch",
        "torch_compile",
        "packing",
        "loss_chunk_tokens",
    ),
    *("gradient_checkpointing", "flash_attn", "tf32", "trust_remote_code"),
    *("mixed_precision", "bf16", "fp16"),
}


def run_facts(config: Config, prepared: Prepared, global_batch_size: int) -> dict[str, Any]:
    """Return the facts that decide what is trained, each with a name that a person can mend."""
    template = prepared.tokenizer.chat_template if prepared.template == "chat" else ""
    return {
        "data (SHA-256)": prepared.data_sha256,
        "base model (sampled SHA-256)": _weights(prepared.base, "config.json", config),
        "--lora_weight_path (sampled SHA-256)": config.lora_weight_path
        and _weights(config.lora_weight_path, "adapter_config.json", config),
        "tokenizer (SHA-256)": tokenizer_sha256(prepared.tokenizer),
        "template": f"{prepared.template} {_sha256(str(template))[:12]}",
        "examples": len(prepared.examples),
        "examples a step": global_batch_size,
        **{f"--{name}": value for name, value in _plain(_result_settings(config)).items()},
    }


def _result_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide what is trained, however the work is split."""
    trains = {
        field.name
        for field in dataclasses.fields(config)
        if field.metadata["group"] in GROUPS_THAT_TRAIN
    }
    values = dataclasses.asdict(config).items()
    # The template is known by what it is, not by how it was asked for.
    kept = {k: v for k, v in values if k in trains - PATHS - TOLD - SPLIT - {"template"}}
    return {"precision": config.precision, **kept}


def _weights(base: str, settings: str, config: Config) -> str:
    """Hash the settings' file, and of each weights file its size, beginning, middle and end.

    Reading all of it would take minutes for a large model; another model of the same shape
    differs in every sample. The hub's models are known by their commit.
    """
    folder, hub = Path(base), {"cache_dir": config.cache_dir}
    if not folder.is_dir():
        return f"{base} {Path(str(cached_file(base, settings, **hub))).parent.name}"
    digest = hashlib.sha256((folder / settings).read_bytes())
    patterns = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
    weights = [file for pattern in patterns for file in folder.glob(pattern)]
    for file in sorted(weights):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as opened:
            for start in (0, size // 2, max(0, size - SAMPLE)):
                opened.seek(start)
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values as they come back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
