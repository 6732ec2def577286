"""A DeepSpeed JSON: read, and checked by DeepSpeed's own classes long before its engine would."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError, tell
from loop.config.parser import nearest

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
# What must be an object.
SECTIONS = ("bf16", "fp16", "data_types", "zero_optimization")
# The loop's own values take the place of these, once they were compared: deepspeed_config.py.
FILLED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "zero_optimization"),
}


def read_json(name: str, where: str, mistakes: list[str] | None = None) -> dict[str, Any]:
    """Return the JSON's values; raises UserError for what DeepSpeed would not take.

    Or adds it to `mistakes`, where given, of each key and section: keys that may not be there are
    left out, and what has a wrong value is "auto", as good as not said.
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
    is_object = isinstance(values.get("zero_optimization", {}), dict)
    for key, value in values.items():
        if key not in KEYS:
            near = nearest(key, list(KEYS))
            tell([f"{where}: {key}: no key that is known here.{near}"], mistakes)
        if key in TAKEN:
            tell([f"{where}: found {key}; {TAKEN[key]}. Remove it from the file."], mistakes)
        if key in SECTIONS and not isinstance(value, dict):
            found = json.dumps(value)
            tell([f"{where}: {key}: found {found}; expected an object."], mistakes)
            values[key] = {}
    values = {key: values[key] for key in values if key in KEYS and key not in TAKEN}
    zero = values.setdefault("zero_optimization", {})
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        found = json.dumps(zero.get("stage"))
        text = f"{where}: zero_optimization.stage: found {found}; expected 1, 2 or 3. Without ZeRO,"
        if is_object:
            tell([f"{text} launch with accelerate_configs/ddp.yaml."], mistakes)
        zero["stage"] = "auto"
    _check_sections(values, where, mistakes)
    return values


def _check_sections(values: dict[str, Any], where: str, mistakes: list[str] | None) -> None:
    """Build each section by itself, so that a message can name what is wrong in it."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def given(section: dict[str, Any]) -> dict[str, Any]:
        # Of a stage that is not known the other keys and sections are looked at as of the usual.
        return {"stage": 2} | {k: value for k, value in section.items() if value != "auto"}

    def build_zero(section: Any) -> None:
        DeepSpeedZeroConfig(**given(section))

    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    tell(_wrong(values, "zero_optimization", build_zero, known, where), mistakes)
    zero = given(values["zero_optimization"])

    for key in [key for key in values if key not in FILLED]:

        def build(section: Any, key: str = key) -> None:
            # Whether one of the two is on is decided elsewhere, and may be "auto".
            mended = {**section, "enabled": False} if key in ("bf16", "fp16") else section
            DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": dict(zero), key: mended})

        tell(_wrong(values, key, build, [], where), mistakes)
    found = values.get("data_types", {}).get("grad_accum_dtype")
    if found not in (None, "fp32", "bf16", "fp16"):  # Looked up by the engine only.
        text = f"{where}: data_types.grad_accum_dtype: found {json.dumps(found)}; expected fp32,"
        tell([f"{text} bf16 or fp16. Mend or remove it."], mistakes)


def _wrong(
    values: dict[str, Any], key: str, build: Callable[[Any], None], known: list[str], where: str
) -> Iterator[str]:
    """Yield what DeepSpeed's class does not take of a section, which is mended in `values`."""
    from pydantic import ValidationError

    try:
        build(values[key])
    except ValidationError as error:
        for told in error.errors():
            path = [str(part) for part in told["loc"] if part != key]
            name, extra = ".".join([key, *path]), told["type"] == "extra_forbidden"
            if not path or not isinstance(values[key], dict):
                _drop(values, key)
            elif extra and len(path) == 1:
                values[key].pop(path[0], None)
            else:
                values[key][path[0]] = "auto"
            if extra:
                remedy = nearest(path[-1], known) or " Mend its name, or remove it."
                yield f"{where}: {name}: unknown key.{remedy}"
            else:
                yield f"{where}: {name}: found {told['input']!r}; {told['msg']}. Mend or remove it."
    except Exception as error:  # What it raises differs from key to key: by far not only its own.
        reason, found = " ".join(str(error).split()), json.dumps(values[key])
        _drop(values, key)
        yield (
            f"{where}: {key}: found {found}, which DeepSpeed does not take "
            f"({reason}). Mend or remove it."
        )


def _drop(values: dict[str, Any], key: str) -> None:
    """Remove a section that is wrong as a whole; of ZeRO's the stage stays, to be compared."""
    section = values.pop(key, None)
    if key == "zero_optimization":
        values[key] = {"stage": section["stage"] if section else "auto"}
