"""Reads a run's settings from flags and YAML, and checks them against each other."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data.errors import UserError, noted, tell
from loop import compat
from loop.config import ADAPTER_FILES, ROOT, Config
from loop.flags import parse

MAIN_JOB = ROOT / "loop" / "main_job.yaml"
C = TypeVar("C", bound=Config)


def read_config(
    argv: Sequence[str],
    config_type: type[C],
    description: str = "",
    mistakes: list[str] | None = None,
) -> C:
    """Return the run's settings from flags and YAML; no flag at all means the main job.

    Raises UserError for anything that is wrong by itself or contradicts something else; or adds it
    to `mistakes`, and goes on with the default.
    """
    known = compat.WITHOUT_MEANING, compat.ALIASES, mistakes
    values = parse(config_type, compat.without(argv, mistakes), description, *known)
    if values.pop("config", None) is None and not {"model_name_or_path", "data_path"} & {*values}:
        values = parse(config_type, ["--config", str(MAIN_JOB)], description) | values
        values.pop("config")
    adapter = values.pop("lora_weight_path", None)
    if adapter:
        with noted(mistakes):
            values |= _adapter_settings(Path(adapter).expanduser(), values)
            values["lora_weight_path"] = adapter
    config = config_type(**values)
    tell(_contradictions(config), mistakes)
    return config


def _contradictions(config: Config) -> Iterator[str]:
    """Yield what contradicts something else."""
    asked = {name for name in ("bf16", "fp16") if getattr(config, name)}
    if config.mixed_precision and config.mixed_precision != "auto":
        asked.add(config.mixed_precision)
    if len(asked) > 1:
        yield (
            f"found both {' and '.join(sorted(asked))}; expected one precision. "
            "Give --mixed_precision alone."
        )
    if config.precision not in ("no", "bf16", "fp16"):
        yield (
            f"the accelerate config's mixed_precision is {config.precision}; expected no, bf16 or "
            "fp16. Give --mixed_precision."
        )
    # Before the launch the accelerate config's precision is not known yet.
    known = config.mixed_precision or "ACCELERATE_MIXED_PRECISION" in os.environ
    if config.flash_attn and known and config.precision == "no":
        yield (
            "--flash_attn: found precision no (fp32); FlashAttention-2 takes bf16 and fp16 only. "
            "Give --mixed_precision bf16, or leave it out."
        )
    if config.num_data == 0:
        yield "--num_data: found 0; expected at least 1, or -1 for all dialogues."
    if config.max_steps == 0:
        yield "--max_steps: found 0; expected at least 1, or -1 to train by epochs."
    yield from _about_evaluation(config)
    yield from _about_trackers(config)
    if config.auto_micro_batch and config.tokens_per_micro_batch:
        yield (
            f"found --auto_micro_batch and --tokens_per_micro_batch {config.tokens_per_micro_batch}"
            "; expected one of them, since the first decides the second."
        )
    if config.global_batch_size and config.gradient_accumulation_steps:
        yield (
            f"found --global_batch_size {config.global_batch_size} and "
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps}; expected one of "
            "them, since the first decides the second."
        )


def _about_evaluation(config: Config) -> Iterator[str]:
    if config.eval_data_path and config.eval_fraction:
        yield (
            f"found --eval_data_path and --eval_fraction {config.eval_fraction:g}; expected one of "
            "them: dialogues of their own to evaluate on, or a part of --data_path."
        )
    evaluates = (config.eval_data_path or config.eval_fraction) and config.eval_strategy != "no"
    if config.sample_prompts and config.eval_strategy == "no":
        yield (
            "--sample_prompts: found --eval_strategy no; expected an evaluation, at which they are "
            "answered. Give --eval_strategy steps or epoch, or leave the prompts out."
        )
    for name in ("load_best_at_end", "early_stopping_patience"):
        if getattr(config, name) and not evaluates:
            yield (
                f"--{name}: found no evaluation; expected one. Give --eval_data_path or "
                "--eval_fraction, and --eval_strategy steps or epoch."
            )


def _about_trackers(config: Config) -> Iterator[str]:
    if "none" in config.report_to and len(config.report_to) > 1:
        yield "--report_to: found none beside a tracker; expected one or the other."
    if config.wandb_artifact and "wandb" not in config.report_to:
        yield "--wandb_artifact: found no wandb in --report_to. Give --report_to wandb."
    if any(not 1 <= len(tag) <= 64 for tag in config.tags or ()):
        yield "--tags: found one of more than 64 characters, which wandb takes at most."


def _adapter_settings(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an existing adapter, which must agree with the flags given."""
    file = folder / "adapter_config.json"
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--lora_weight_path: {file}: cannot be read: {error.strerror}. Give a "
            "folder with adapter_config.json and adapter_model.safetensors."
        ) from None
    except ValueError as error:
        raise UserError(f"--lora_weight_path: {file}: not valid JSON: {error}.") from None
    if not isinstance(saved, dict) or saved.get("peft_type") != "LORA":
        raise UserError(f"--lora_weight_path: {file}: found no LoRA adapter; expected peft's.")
    missing = {"r", "lora_alpha", "bias", "target_modules", "lora_dropout"} - {*saved}
    if missing:
        raise UserError(f"--lora_weight_path: {file}: lacks {', '.join(sorted(missing))}.")
    if not any((folder / name).is_file() for name in ADAPTER_FILES):
        raise UserError(f"--lora_weight_path {folder}: no weights; expected {ADAPTER_FILES[0]}.")
    targets = saved["target_modules"]
    if not isinstance(saved["r"], int) or not isinstance(targets, str | list):
        raise UserError(f"--lora_weight_path: {file}: r or target_modules is not of peft's kind.")
    settings = {
        "lora_r": saved["r"],
        "lora_alpha": saved["lora_alpha"],
        "lora_bias": saved["bias"],
        "lora_target_modules": (targets,) if isinstance(targets, str) else tuple(sorted(targets)),
    }
    for name, value in settings.items():
        same = name not in given or (
            set(given[name]) == set(value) if isinstance(value, tuple) else given[name] == value
        )
        if not same:
            raise UserError(
                f"--{name}: found {given[name]}, but the adapter {folder} has {value}. Leave the "
                "flag out, or train a new adapter without --lora_weight_path."
            )
    return {"lora_dropout": saved["lora_dropout"], **given, **settings}


def dump(config: Config) -> str:
    """Return the settings as YAML that `--config` reads back."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    values["mixed_precision"] = config.precision
    header = "# Every setting of this run; give it to --config to repeat the run.\n"
    return header + yaml.safe_dump(values, sort_keys=False)
