"""DeepSpeed's config: the user's JSON or the accelerate config's stage, and the loop's values."""

import json
import os
from pathlib import Path
from typing import Any

from data.errors import UserError
from loop.config import Config
from loop.flags import nearest
from loop.windows import Layout

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
# With offload too the optimizer is PyTorch's AdamW, on the CPU, which needs no compiler.
# DeepSpeed's own is faster, for whole models; an adapter's update takes no time in either.
NEEDED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
# Elements a gradient bucket holds. DeepSpeed's default, 5e8, is made for training whole models and
# allocates gigabytes; an adapter's gradients fit in a few of these.
BUCKET = 20_000_000
ENV = "ACCELERATE_DEEPSPEED_"


def zero_settings(config: Config) -> dict[str, Any]:
    """Return what was asked of DeepSpeed, empty where the launch is not DeepSpeed's.

    Raises UserError for a JSON file that is wrong by itself or contradicts the accelerate config.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if config.deepspeed and not launched:
        raise UserError(
            f"found --deepspeed {config.deepspeed} under an accelerate config without DeepSpeed; "
            "expected both or neither. Launch with accelerate_configs/zero2.yaml, or leave it out."
        )
    if not launched:
        return {}
    # Given by the accelerate config where deepspeed_config_file is one of its keys.
    theirs = os.environ.get(f"{ENV}CONFIG_FILE", "none")
    if config.deepspeed and theirs not in ("none", config.deepspeed):
        raise UserError(
            f"found --deepspeed {config.deepspeed} and the accelerate config's "
            f"deepspeed_config_file {theirs}; expected one of them."
        )
    if config.deepspeed:
        values = _read_json(config.deepspeed, "--deepspeed")
        if theirs == "none":
            _check_against_accelerate(values["zero_optimization"], config.deepspeed)
        return values
    if theirs != "none":
        return _read_json(theirs, "deepspeed_config_file")
    stage = int(os.environ.get(f"{ENV}ZERO_STAGE", "2"))
    if stage not in (1, 2, 3):
        raise UserError(
            f"the accelerate config's zero_stage: found {stage}; expected 1, 2 or 3. Without ZeRO, "
            "launch with accelerate_configs/ddp.yaml."
        )
    section: dict[str, Any] = {"stage": stage}
    for what in ("optimizer", "param"):
        device = os.environ.get(f"{ENV}OFFLOAD_{what.upper()}_DEVICE", "none")
        if device == "nvme":  # accelerate 1.15 does not pass its path on (utils/launch.py).
            raise UserError(
                f"the accelerate config's offload_{what}_device: found nvme; expected cpu or none. "
                "For NVMe give a DeepSpeed JSON with its path (--deepspeed FILE)."
            )
        section[f"offload_{what}"] = {"device": device}
    yaml_values: dict[str, Any] = {"zero_optimization": section}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        given = os.environ.get(f"ACCELERATE_{key.upper()}", "none").lower()
        if given not in ("none", "auto", "1", "1.0"):  # 1 is also what accelerate puts for nothing.
            yaml_values[key] = float(given)
    return yaml_values


def complete(asked: dict[str, Any], config: Config, layout: Layout) -> dict[str, Any]:
    """Return DeepSpeed's whole config: what was asked, and the loop's own values.

    Raises UserError for a value in the file that says otherwise than the flags.
    """
    _check_against_flags(asked, config, layout)
    values = {key: value for key, value in asked.items() if key != "train_batch_size"}
    zero = {key: value for key, value in asked["zero_optimization"].items() if value != "auto"}
    buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    values |= {
        "zero_optimization": buckets | zero,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation,
        # "auto" would become the constant 1.0 (accelerate 1.15, accelerator.py).
        "gradient_clipping": config.max_grad_norm,
        "bf16": {**asked.get("bf16", {}), "enabled": config.precision == "bf16"},
        "fp16": {**asked.get("fp16", {}), "enabled": config.precision == "fp16"},
        "steps_per_print": asked.get("steps_per_print", float("inf")),
        **NEEDED,
    }
    # In bf16 a sum over ranks or micro-batches would round at each of them.
    values.setdefault("communication_data_type", "fp32")
    if config.precision == "bf16":
        values["data_types"] = {"grad_accum_dtype": "fp32", **asked.get("data_types", {})}
    return values


def _check_against_flags(asked: dict[str, Any], config: Config, layout: Layout) -> None:
    flags = {
        "train_micro_batch_size_per_gpu": (
            "--per_device_train_batch_size",
            config.per_device_train_batch_size,
        ),
        "gradient_accumulation_steps": ("--gradient_accumulation_steps", layout.accumulation),
        "train_batch_size": ("examples a step", layout.global_batch_size),
        "gradient_clipping": ("--max_grad_norm", config.max_grad_norm),
        "bf16": ("--mixed_precision", config.precision),
        "fp16": ("--mixed_precision", config.precision),
    }
    for key, (flag, value) in flags.items():
        found = asked.get(key, "auto")
        wanted: Any = value
        if key in ("bf16", "fp16"):
            found, wanted = asked.get(key, {}).get("enabled", "auto"), value == key
        if found not in ("auto", wanted):
            raise UserError(
                f"the DeepSpeed config says {key} {json.dumps(asked[key])}, {flag} is {value}; "
                'expected the same. Change one of them, or write "auto" for the first.'
            )
    for key, needed in NEEDED.items():
        if asked.get(key, needed) is not needed:
            raise UserError(
                f"the DeepSpeed config says {key} {json.dumps(asked[key])}; expected "
                f"{json.dumps(needed)}: the optimizer is PyTorch's AdamW. Remove it."
            )


def launch_facts(config: Config) -> dict[str, Any]:
    """Return the backend and DeepSpeed's values, each by its own name, to compare machines by.

    Paths may differ from machine to machine; what is left open is as good as not there.
    """
    asked = zero_settings(config)
    stage = asked["zero_optimization"]["stage"] if asked else 0
    facts: dict[str, Any] = {"the backend": f"DeepSpeed ZeRO-{stage}" if asked else "DDP"}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else key, inner)
        elif value not in ("auto", "none", None) and not name.endswith(("path", "file")):
            facts[f"DeepSpeed's {name}"] = value

    add("", asked)
    return facts


def precision_of(asked: dict[str, Any]) -> str | None:
    """Return the precision that a DeepSpeed file switches on, if it does."""
    return next(
        (key for key in ("bf16", "fp16") if asked.get(key, {}).get("enabled") is True), None
    )


def _read_json(name: str, where: str) -> dict[str, Any]:
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
            raise UserError(f"{where}: {key}: no key that is known here.{nearest(key, list(KEYS))}")
        if key in TAKEN:
            raise UserError(f"{where}: found {key}; {TAKEN[key]}. Remove it from the file.")
        if key in ("bf16", "fp16", "data_types", "zero_optimization") and not isinstance(
            value, dict
        ):
            raise UserError(f"{where}: {key}: found {json.dumps(value)}; expected an object.")
    zero = values.get("zero_optimization", {})
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(
            f"{where}: zero_optimization.stage: found {json.dumps(zero.get('stage'))}; expected 1, "
            "2 or 3. Without ZeRO, launch with accelerate_configs/ddp.yaml."
        )
    _check_zero_section(zero, where)
    return values


def _check_zero_section(zero: dict[str, Any], where: str) -> None:
    """Let DeepSpeed's own model of the section check it, long before the engine would."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"{where}: zero_optimization.{key}: unknown key.{nearest(key, known)}"
            ) from None
        raise UserError(
            f"{where}: zero_optimization.{key}: found {first['input']!r}; {first['msg']}."
        ) from None


def _check_against_accelerate(zero: dict[str, Any], name: str) -> None:
    """Compare a file given by flag with the stage and the offloads of the accelerate config."""

    def device(section: Any) -> str:
        return str((section or {}).get("device") or "none")

    pairs = {
        "zero_stage": (str(zero["stage"]), os.environ.get(f"{ENV}ZERO_STAGE", "2")),
        "offload_optimizer_device": (
            device(zero.get("offload_optimizer")),
            os.environ.get(f"{ENV}OFFLOAD_OPTIMIZER_DEVICE", "none"),
        ),
        "offload_param_device": (
            device(zero.get("offload_param")),
            os.environ.get(f"{ENV}OFFLOAD_PARAM_DEVICE", "none"),
        ),
    }
    for key, (found, launched) in pairs.items():
        if found != launched:
            offloads = any(pairs[k][0] == "cpu" for k in pairs if k != "zero_stage")
            fitting = f"accelerate_configs/zero{zero['stage']}{'_offload' * offloads}.yaml"
            raise UserError(
                f"--deepspeed {name} has {key} {found}, the accelerate config has {launched}; "
                f"expected the same. Launch with {fitting}."
            )
