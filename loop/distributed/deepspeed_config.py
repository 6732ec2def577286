"""Builds DeepSpeed's config from the flags and from the user's JSON or the accelerate config."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError, add_errors, collect_errors
from loop.config.flags import Config
from loop.config.parser import nearest
from loop.distributed.layout import Layout

# The keys of a DeepSpeed JSON. Others are errors: DeepSpeed would ignore them (0.19,
# runtime/config.py). REFUSED_KEYS are listed too, since their message gives another reason.
KNOWN_KEYS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "zero_optimization", "bf16", "fp16", "data_types", "aio", "compile"),
    *("communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("sparse_gradients", "steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
    *("dump_state", "flops_profiler", "comms_logger", "zero_allow_untested_optimizer"),
    *("zero_force_ds_cpu_optimizer", "activation_checkpointing", "disable_allgather"),
    *("gradient_allreduce_op", "log_level", "disable_python_gc", "dataloader_drop_last"),
    *("tensorboard", "wandb", "csv_monitor", "optimizer", "scheduler", "amp", "torch_autocast"),
)
REFUSED_KEYS = {
    "optimizer": "the loop has its own AdamW (--learning_rate, --weight_decay)",
    "scheduler": "the loop sets the learning rate (--lr_scheduler_type, --warmup_ratio)",
    "amp": "precision is --mixed_precision",
    "torch_autocast": "precision is --mixed_precision",
}
OBJECT_KEYS = ("bf16", "fp16", "data_types", "zero_optimization")
# `complete` compares these with the flags and replaces them by the loop's values.
COMPARED_KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "zero_optimization"),
}
# The optimizer is PyTorch's AdamW; under offload, it runs on the CPU. It needs no compiler.
# DeepSpeed's AdamW is faster for full models, but an adapter's update is cheap with both.
REQUIRED_VALUES = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
# Elements of a gradient bucket. DeepSpeed's default, 5e8, allocates gigabytes for the gradients of
# full models. An adapter's gradients fit in a few of these buckets.
BUCKET = 20_000_000
ENV_PREFIX = "ACCELERATE_DEEPSPEED_"
# Keys of zero_optimization that the accelerate config can set, too.
LAUNCH_KEYS = ("stage", "offload_optimizer", "offload_param")


def zero_settings(config: Config, errors: list[str] | None = None) -> dict[str, Any]:
    """Return DeepSpeed's settings from its JSON or the accelerate config; {} without DeepSpeed.

    Raises UserError for a JSON that is invalid or contradicts the accelerate config; with a list
    `errors`, appends the errors instead and continues with the accelerate config's values.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if config.deepspeed and not launched:
        raise UserError(
            f"found --deepspeed {config.deepspeed} under an accelerate config without DeepSpeed; "
            "expected both or neither. Launch with accelerate_configs/zero2.yaml, or leave the "
            "flag out."
        )
    if not launched:
        return {}
    # The accelerate config's deepspeed_config_file, if it has that key.
    theirs = os.environ.get(f"{ENV_PREFIX}CONFIG_FILE", "none")
    if config.deepspeed and theirs not in ("none", config.deepspeed):
        raise UserError(
            f"found --deepspeed {config.deepspeed} and the accelerate config's "
            f"deepspeed_config_file {theirs}; expected one of them."
        )
    with collect_errors(errors):
        if config.deepspeed and theirs == "none":
            values = read_json(config.deepspeed, "--deepspeed", errors)
            zero = values["zero_optimization"]
            add_errors(_against_accelerate(zero, config.deepspeed), errors)
            return _fill_open_values(values)
        if theirs != "none":
            where = "--deepspeed" if config.deepspeed else "deepspeed_config_file"
            return _fill_open_values(read_json(theirs, where, errors))
    return _read_environment()


def read_json(name: str, where: str, errors: list[str] | None = None) -> dict[str, Any]:
    """Return the values of a DeepSpeed JSON; raises UserError for an invalid key or value.

    With a list `errors`, appends every error instead. Then invalid keys are left out, and an
    invalid value becomes "auto", which means not set.
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
        if key not in KNOWN_KEYS:
            near = nearest(key, list(KNOWN_KEYS))
            add_errors([f"{where}: {key}: unknown key.{near}"], errors)
        if key in REFUSED_KEYS:
            add_errors(
                [f"{where}: found {key}; {REFUSED_KEYS[key]}. Remove it from the file."], errors
            )
        if key in OBJECT_KEYS and not isinstance(value, dict):
            found = json.dumps(value)
            add_errors([f"{where}: {key}: found {found}; expected an object."], errors)
            values[key] = {}
    values = {key: values[key] for key in values if key in KNOWN_KEYS and key not in REFUSED_KEYS}
    zero = values.setdefault("zero_optimization", {})
    if type(zero.get("stage")) is not int or zero["stage"] not in (1, 2, 3):
        found = json.dumps(zero.get("stage"))
        text = f"{where}: zero_optimization.stage: found {found}; expected 1, 2 or 3. Without ZeRO,"
        if is_object:
            add_errors([f"{text} launch with accelerate_configs/ddp.yaml."], errors)
        zero["stage"] = "auto"
    _check_sections(values, where, errors)
    return values


def _check_sections(values: dict[str, Any], where: str, errors: list[str] | None) -> None:
    """Build each section separately, so that an error can name the section's invalid key."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def set_values(section: dict[str, Any]) -> dict[str, Any]:
        # If the stage is not set, the other keys are checked as under stage 2.
        return {"stage": 2} | {k: value for k, value in section.items() if value != "auto"}

    def build_zero(section: Any) -> None:
        DeepSpeedZeroConfig(**set_values(section))

    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    add_errors(_section_errors(values, "zero_optimization", build_zero, known, where), errors)
    zero = set_values(values["zero_optimization"])

    for key in [key for key in values if key not in COMPARED_KEYS]:

        def build(section: Any, key: str = key) -> None:
            # "enabled" may be "auto". `against_flags` checks it.
            if key in ("bf16", "fp16"):
                section = {**section, "enabled": False}
            DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": dict(zero), key: section})

        add_errors(_section_errors(values, key, build, [], where), errors)
    found = values.get("data_types", {}).get("grad_accum_dtype")
    if found not in (None, "fp32", "bf16", "fp16"):  # DeepSpeed checks this only in its engine.
        text = f"{where}: data_types.grad_accum_dtype: found {json.dumps(found)}; expected fp32,"
        add_errors([f"{text} bf16 or fp16. Correct or remove it."], errors)


def _section_errors(
    values: dict[str, Any], key: str, build: Callable[[Any], None], known: list[str], where: str
) -> Iterator[str]:
    """Yield an error for each value that DeepSpeed rejects; make it "auto" or remove its key."""
    from pydantic import ValidationError

    try:
        build(values[key])
    except ValidationError as error:
        for detail in error.errors():
            path = [str(part) for part in detail["loc"] if part != key]
            name, extra = ".".join([key, *path]), detail["type"] == "extra_forbidden"
            if not path or not isinstance(values[key], dict):
                _drop_section(values, key)
            elif extra and len(path) == 1:
                values[key].pop(path[0], None)
            else:
                values[key][path[0]] = "auto"
            if extra:
                remedy = nearest(path[-1], known) or " Correct its name, or remove it."
                yield f"{where}: {name}: unknown key.{remedy}"
            else:
                yield (
                    f"{where}: {name}: found {detail['input']!r}; {detail['msg']}. "
                    "Correct or remove it."
                )
    except Exception as error:  # DeepSpeed's exception types differ between keys.
        reason, found = " ".join(str(error).split()), json.dumps(values[key])
        _drop_section(values, key)
        yield (
            f"{where}: {key}: found {found}, which DeepSpeed does not accept "
            f"({reason}). Correct or remove it."
        )


def _drop_section(values: dict[str, Any], key: str) -> None:
    """Remove an invalid section. zero_optimization keeps its stage, which is compared later."""
    section = values.pop(key, None)
    if key == "zero_optimization":
        values[key] = {"stage": section["stage"] if section else "auto"}


def _against_accelerate(zero: dict[str, Any], name: str) -> Iterator[str]:
    """Yield an error for each stage or offload device that differs from the accelerate config's."""

    def device(section: Any) -> str:
        return "auto" if section == "auto" else str((section or {}).get("device") or "none")

    pairs = {
        "zero_stage": (str(zero["stage"]), os.environ.get(f"{ENV_PREFIX}ZERO_STAGE", "2")),
        "offload_optimizer_device": (
            device(zero.get("offload_optimizer")),
            os.environ.get(f"{ENV_PREFIX}OFFLOAD_OPTIMIZER_DEVICE", "none"),
        ),
        "offload_param_device": (
            device(zero.get("offload_param")),
            os.environ.get(f"{ENV_PREFIX}OFFLOAD_PARAM_DEVICE", "none"),
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


def _fill_open_values(values: dict[str, Any]) -> dict[str, Any]:
    """Replace each "auto" of LAUNCH_KEYS by the accelerate config's value."""
    zero = values["zero_optimization"]
    left_open = [key for key in LAUNCH_KEYS if zero.get(key) == "auto"]
    if left_open:
        launched = _read_environment()["zero_optimization"]
        zero |= {key: launched[key] for key in left_open}
    return values


def _read_environment() -> dict[str, Any]:
    """Return the accelerate config's DeepSpeed settings, which the launcher exports."""
    stage = os.environ.get(f"{ENV_PREFIX}ZERO_STAGE", "2")
    if stage not in ("1", "2", "3"):
        raise UserError(
            f"the accelerate config's zero_stage: found {stage}; expected 1, 2 or 3. Without ZeRO, "
            "launch with accelerate_configs/ddp.yaml."
        )
    section: dict[str, Any] = {"stage": int(stage)}
    for kind in ("optimizer", "param"):
        device = os.environ.get(f"{ENV_PREFIX}OFFLOAD_{kind.upper()}_DEVICE", "none")
        if device == "nvme":  # accelerate 1.15 does not export NVMe's path (utils/launch.py).
            raise UserError(
                f"the accelerate config's offload_{kind}_device: found nvme; expected cpu or none. "
                "For NVMe give a DeepSpeed JSON with its path (--deepspeed FILE)."
            )
        section[f"offload_{kind}"] = {"device": device}
    yaml_values: dict[str, Any] = {"zero_optimization": section}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        given = os.environ.get(f"ACCELERATE_{key.upper()}", "none").lower()
        # accelerate exports 1 also for a config without accumulation.
        if given in ("none", "auto") or (key != "gradient_clipping" and given in ("1", "1.0")):
            continue
        try:
            yaml_values[key] = float(given)
        except ValueError:
            raise UserError(
                f"the accelerate config's {key}: found {given}; expected a number. Correct it, "
                "or remove it."
            ) from None
    return yaml_values


def complete(asked: dict[str, Any], config: Config, layout: Layout) -> dict[str, Any]:
    """Return DeepSpeed's complete config: the settings in `asked` and the loop's values.

    Raises UserError for a value that contradicts a flag.
    """
    add_errors(against_flags(asked, config, layout), None)
    values = {key: value for key, value in asked.items() if key != "train_batch_size"}
    zero = {key: value for key, value in asked["zero_optimization"].items() if value != "auto"}
    buckets = {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    values |= {
        "zero_optimization": buckets | zero,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.divisor,
        # accelerate 1.15 would replace "auto" by 1.0 (accelerator.py).
        "gradient_clipping": config.max_grad_norm,
        "bf16": {**asked.get("bf16", {}), "enabled": config.precision == "bf16"},
        "fp16": {**asked.get("fp16", {}), "enabled": config.precision == "fp16"},
        "steps_per_print": asked.get("steps_per_print", float("inf")),
        **REQUIRED_VALUES,
    }
    # A bf16 sum over ranks or micro-batches would round after each addition.
    values.setdefault("communication_data_type", "fp32")
    if config.precision == "bf16":
        values["data_types"] = {"grad_accum_dtype": "fp32", **asked.get("data_types", {})}
    return values


def against_flags(
    asked: dict[str, Any], config: Config, layout: Layout | None = None
) -> Iterator[str]:
    """Yield an error for each DeepSpeed value that contradicts a flag.

    layout: None before the data is read; values that depend on it are not compared then.
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
                f"the DeepSpeed config has {key} {json.dumps(asked[key])}, {flag} is {value}; "
                'expected the same. Change one of them, or set the DeepSpeed value to "auto".'
            )
    for key, needed in REQUIRED_VALUES.items():
        if asked.get(key, needed) is not needed:
            yield (
                f"the DeepSpeed config has {key} {json.dumps(asked[key])}; expected "
                f"{json.dumps(needed)}: the optimizer is PyTorch's AdamW. Remove it."
            )


def launch_facts(config: Config) -> dict[str, Any]:
    """Return the backend and DeepSpeed's values by name, to compare them between ranks.

    Values that are not set are left out. So are paths, since they may differ between machines.
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
    """Return the precision that a DeepSpeed JSON enables; None: it enables none."""
    return next(
        (key for key in ("bf16", "fp16") if asked.get(key, {}).get("enabled") is True), None
    )
