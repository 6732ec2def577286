"""DeepSpeed's config: the user's JSON or the accelerate config's stage, and the loop's values."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data.errors import UserError, add_errors, collect_errors
from loop.config.flags import Config
from loop.config.parser import nearest
from loop.distributed.layout import Layout

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


def read_json(name: str, where: str, errors: list[str] | None = None) -> dict[str, Any]:
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
            add_errors([f"{where}: {key}: no key that is known here.{near}"], errors)
        if key in TAKEN:
            add_errors([f"{where}: found {key}; {TAKEN[key]}. Remove it from the file."], errors)
        if key in SECTIONS and not isinstance(value, dict):
            found = json.dumps(value)
            add_errors([f"{where}: {key}: found {found}; expected an object."], errors)
            values[key] = {}
    values = {key: values[key] for key in values if key in KEYS and key not in TAKEN}
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
    """Build each section by itself, so that a message can name what is wrong in it."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def given(section: dict[str, Any]) -> dict[str, Any]:
        # Of a stage that is not known the other keys and sections are looked at as of the usual.
        return {"stage": 2} | {k: value for k, value in section.items() if value != "auto"}

    def build_zero(section: Any) -> None:
        DeepSpeedZeroConfig(**given(section))

    known = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    add_errors(_wrong(values, "zero_optimization", build_zero, known, where), errors)
    zero = given(values["zero_optimization"])

    for key in [key for key in values if key not in FILLED]:

        def build(section: Any, key: str = key) -> None:
            # Whether one of the two is on is decided elsewhere, and may be "auto".
            mended = {**section, "enabled": False} if key in ("bf16", "fp16") else section
            DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": dict(zero), key: mended})

        add_errors(_wrong(values, key, build, [], where), errors)
    found = values.get("data_types", {}).get("grad_accum_dtype")
    if found not in (None, "fp32", "bf16", "fp16"):  # Looked up by the engine only.
        text = f"{where}: data_types.grad_accum_dtype: found {json.dumps(found)}; expected fp32,"
        add_errors([f"{text} bf16 or fp16. Mend or remove it."], errors)


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


# With offload too the optimizer is PyTorch's AdamW, on the CPU, which needs no compiler.
# DeepSpeed's own is faster, for whole models; an adapter's update takes no time in either.
NEEDED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
# Elements a gradient bucket holds. DeepSpeed's default, 5e8, is made for training whole models and
# allocates gigabytes; an adapter's gradients fit in a few of these.
BUCKET = 20_000_000
ENV = "ACCELERATE_DEEPSPEED_"
DECISIVE = ("stage", "offload_optimizer", "offload_param")  # also the accelerate config's to say


def zero_settings(config: Config, errors: list[str] | None = None) -> dict[str, Any]:
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
    with collect_errors(errors):
        if config.deepspeed and theirs == "none":
            values = read_json(config.deepspeed, "--deepspeed", errors)
            zero = values["zero_optimization"]
            add_errors(_against_accelerate(zero, config.deepspeed), errors)
            return _filled(values)
        if theirs != "none":
            where = "--deepspeed" if config.deepspeed else "deepspeed_config_file"
            return _filled(read_json(theirs, where, errors))
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
    add_errors(against_flags(asked, config, layout), None)
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
