"""A DeepSpeed JSON: read, and checked by DeepSpeed's own classes long before its engine would."""

import json
from pathlib import Path
from typing import Any

from data.errors import UserError, tell
from loop.flags import nearest

# What a DeepSpeed JSON may hold: DeepSpeed itself passes over an unknown key in silence
# (deepspeed 0.19, runtime/config.py). Of the last line's some are known, and refused below.
KEYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "zero_optimization", "bf16", "fp16", "data_types", "aio", "compile"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("sparse_gradients", "steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
    *("dump_state", "flops_profiler", "comms_logger", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "activation_checkpointing", "disable_allgather"),
    *("gradient_allreduce_op", "log_level", "disable_python_gc", "dataloader_drop_last"),
    *("tensorboard", "wandb", "csv_monitor", "optimizer", "scheduler", "amp", "torch_autocast"),
)
TAKEN = {
    "optimizer": "the loop has its own AdamW (--learning_rate, --weight_decay)",
    "scheduler": "the loop sets the learning rate (--lr_scheduler_type, --warmup_ratio)",
    "amp": "precision is --mixed_precision",
    "torch_autocast": "precision is --mixed_precision",
}
# The loop's own values take the place of these, once they were compared: loop/zero.py.
FILLED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "zero_optimization"),
}


def read_json(name: str, where: str, mistakes: list[str] | None = None) -> dict[str, Any]:
    """Return the JSON's values; raises UserError for what DeepSpeed would not take.

    Keys that may not be there are added to `mistakes`, where given, and left out.
    """
    where = f"{where} {name}"
    try:
        values = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a JSON object.")
    for key, value in values.items():
        if key not in KEYS:
            near = nearest(key, list(KEYS))
            tell([f"{where}: {key}: no key that is known here.{near}"], mistakes)
        if key in TAKEN:
            tell([f"{where}: found {key}; {TAKEN[key]}. Remove it from the file."], mistakes)
        if key in ("bf16", "fp16", "data_types", "zero_optimization") and not isinstance(
            value, dict
        ):
            raise UserError(f"{where}: {key}: found {json.dumps(value)}; expected an object.")
    values = {key: values[key] for key in values if key in KEYS and key not in TAKEN}
    zero = values.get("zero_optimization", {})
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        raise UserError(
            f"{where}: zero_optimization.stage: found {json.dumps(zero.get('stage'))}; expected 1, "
            "2 or 3. Without ZeRO, launch with accelerate_configs/ddp.yaml."
        )
    _check_sections(values, where)
    return values


def _check_sections(values: dict[str, Any], where: str) -> None:
    """Build each section by itself, so that the message can name the one that is wrong."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    zero = {k: value for k, value in values["zero_optimization"].items() if value != "auto"}
    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    rest = {key: value for key, value in values.items() if key not in FILLED}
    key = "zero_optimization"  # what a message names: the one at which it failed
    try:
        DeepSpeedZeroConfig(**zero)
        known = []
        for key, value in rest.items():
            # Whether one of the two is on is decided elsewhere, and may be "auto".
            mended = {**value, "enabled": False} if key in ("bf16", "fp16") else value
            DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": dict(zero), key: mended})
    except ValidationError as error:
        first = error.errors()[0]
        inner = ".".join(str(part) for part in first["loc"] if part != key)
        name = f"{key}.{inner}" if inner else key
        if first["type"] == "extra_forbidden":
            remedy = nearest(inner, known) or " Mend its name, or remove it."
            raise UserError(f"{where}: {name}: unknown key.{remedy}") from None
        raise UserError(
            f"{where}: {name}: found {first['input']!r}; {first['msg']}. Mend or remove it."
        ) from None
    except Exception as error:  # What it raises differs from key to key: by far not only its own.
        reason = " ".join(str(error).split())
        raise UserError(
            f"{where}: {key}: found {json.dumps(values[key])}, which DeepSpeed does not take "
            f"({reason}). Mend or remove it."
        ) from None
    found = values.get("data_types", {}).get("grad_accum_dtype")
    if found not in (None, "fp32", "bf16", "fp16"):  # Looked up by the engine only.
        raise UserError(
            f"{where}: data_types.grad_accum_dtype: found {json.dumps(found)}; expected fp32, bf16 "
            "or fp16. Mend or remove it."
        )
