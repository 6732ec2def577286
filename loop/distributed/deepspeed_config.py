"""DeepSpeed's config: the user's JSON or the accelerate config's stage, and the loop's values."""

import json
import os
from collections.abc import Iterator
from typing import Any

from data.errors import UserError, noted, tell
from loop.config.flags import Config
from loop.distributed.zero_file import read_json
from loop.inputs.windows import Layout

# With offload too the optimizer is PyTorch's AdamW, on the CPU, which needs no compiler.
# DeepSpeed's own is faster, for whole models; an adapter's update takes no time in either.
NEEDED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
# Elements a gradient bucket holds. DeepSpeed's default, 5e8, is made for training whole models and
# allocates gigabytes; an adapter's gradients fit in a few of these.
BUCKET = 20_000_000
ENV = "ACCELERATE_DEEPSPEED_"
DECISIVE = ("stage", "offload_optimizer", "offload_param")  # also the accelerate config's to say


def zero_settings(config: Config, mistakes: list[str] | None = None) -> dict[str, Any]:
    """Return what was asked of DeepSpeed, empty where the launch is not DeepSpeed's.

    Raises UserError for a JSON file that is wrong by itself or contradicts the accelerate config;
    or adds it to `mistakes`, and goes on with what the accelerate config asks for.
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
    with noted(mistakes):
        if config.deepspeed and theirs == "none":
            values = read_json(config.deepspeed, "--deepspeed", mistakes)
            zero = values["zero_optimization"]
            tell(_against_accelerate(zero, config.deepspeed), mistakes)
            return _filled(values)
        if theirs != "none":
            where = "--deepspeed" if config.deepspeed else "deepspeed_config_file"
            return _filled(read_json(theirs, where, mistakes))
    return _read_environment()


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """Have the accelerate config say what a wrong value in a file leaves open."""
    zero = values["zero_optimization"]
    left_open = [key for key in DECISIVE if zero.get(key) == "auto"]
    if left_open:
        launched = _read_environment()["zero_optimization"]
        zero |= {key: launched[key] for key in left_open}
    return values


def _read_environment() -> dict[str, Any]:
    """Return what the accelerate config asks for by its own keys, which it exports."""
    stage = os.environ.get(f"{ENV}ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise UserError(
            f"the accelerate config's zero_stage: found {stage}; expected 1, 2 or 3. Without ZeRO, "
            "launch with accelerate_configs/ddp.yaml."
        )
    section: dict[str, Any] = {"stage": int(stage)}
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
        # 1 is also what accelerate puts where no accumulation was asked for.
        if given in ("none", "auto") or (key != "gradient_clipping" and given in ("1", "1.0")):
            continue
        try:
            yaml_values[key] = float(given)
        except ValueError:
            raise UserError(
                f"the accelerate config's {key}: found {given}; expected a number. Mend it, or "
                "remove it."
            ) from None
    return yaml_values


def complete(asked: dict[str, Any], config: Config, layout: Layout) -> dict[str, Any]:
    """Return DeepSpeed's whole config: what was asked, and the loop's own values.

    Raises UserError for a value in the file that says otherwise than the flags.
    """
    tell(against_flags(asked, config, layout), None)
    values = {key: value for key, value in asked.items() if key != "train_batch_size"}
    zero = {key: value for key, value in asked["zero_optimization"].items() if value != "auto"}
    buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    values |= {
        "zero_optimization": buckets | zero,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.divisor,
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


def against_flags(
    asked: dict[str, Any], config: Config, layout: Layout | None = None
) -> Iterator[str]:
    """Yield each value in the file that says otherwise than the flags.

    Without a layout, which needs the data, those alone that depend on none.
    """
    flags: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": (
            "--per_device_train_batch_size",
            config.per_device_train_batch_size,
        ),
        "gradient_clipping": ("--max_grad_norm", config.max_grad_norm),
        "bf16": ("--mixed_precision", config.precision),
        "fp16": ("--mixed_precision", config.precision),
    }
    if layout:
        flags |= {
            "gradient_accumulation_steps": ("--gradient_accumulation_steps", layout.accumulation),
            "train_batch_size": ("examples a step", layout.global_batch_size),
        }
    for key, (flag, value) in flags.items():
        found = asked.get(key, "auto")
        wanted: Any = value
        if key in ("bf16", "fp16"):
            found, wanted = asked.get(key, {}).get("enabled", "auto"), value == key
        if found not in ("auto", wanted):
            yield (
                f"the DeepSpeed config says {key} {json.dumps(asked[key])}, {flag} is {value}; "
                'expected the same. Change one of them, or write "auto" for the first.'
            )
    for key, needed in NEEDED.items():
        if asked.get(key, needed) is not needed:
            yield (
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


def _against_accelerate(zero: dict[str, Any], name: str) -> Iterator[str]:
    """Yield where a file given by flag has another stage or offload than the accelerate config."""

    def device(section: Any) -> str:
        return "auto" if section == "auto" else str((section or {}).get("device") or "none")

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
    stage, launched_stage = pairs["zero_stage"]
    offloads = any(pairs[key][0] == "cpu" for key in pairs if key != "zero_stage")
    number = launched_stage if stage == "auto" else stage
    fitting = f"accelerate_configs/zero{number}{'_offload' * offloads}.yaml"
    for key, (found, launched) in pairs.items():
        if found not in ("auto", launched):
            yield (
                f"--deepspeed {name} has {key} {found}, the accelerate config has {launched}; "
                f"expected the same. Launch with {fitting}."
            )
