"""Reads the settings of a run from flags and YAML, and checks them for contradictions."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from data.errors import UserError, add_errors, collect_errors
from loop.config.flags import ADAPTER_FILES, ROOT, Config
from loop.config.parser import parse

SHARDING = "the accelerate config selects sharding: see accelerate_configs/zero3.yaml"
# Flags of FastChat and Transformers that are accepted without effect, and why.
IGNORED_FLAGS = {
    "lazy_preprocess": "dialogues are always encoded before training",
    "optim": "the optimizer is always AdamW",
    "fsdp": SHARDING,
    "fsdp_config": SHARDING,
    "fsdp_transformer_layer_cls_to_wrap": SHARDING,
}

EVALUATION_FLAGS = ("eval_steps", "per_device_eval_batch_size")
NO_EVALUATION_DATA = "there is no evaluation data; give --eval_data_path or --eval_fraction"
# Former names. Flags, YAML files and files of older versions may have them; --help omits them.
ALIASES = {
    "evaluation_strategy": "eval_strategy",
    "load_best_at_end": "load_best_model_at_end",
    "max_bad_steps": "max_nonfinite_steps",
    "report": "data_report",
    "resume_anyway": "allow_resume_mismatch",
    "supervise": "train_on",
}


def with_current_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of any version with former flag names replaced by the current ones.

    >>> with_current_names({"supervise": "all", "--resume_anyway": True, "seed": 1})
    {'train_on': 'all', '--allow_resume_mismatch': True, 'seed': 1}
    """
    old = {f"{dashes}{a}": f"{dashes}{b}" for dashes in ("", "--") for a, b in ALIASES.items()}
    return {old.get(name, name): value for name, value in settings.items()}


def with_new_flags(settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return settings of an older version, with the defaults of the named flags that it lacks.

    >>> with_new_flags({"--seed": 1}, ["--train_on_reasoning", "data"])
    {'--train_on_reasoning': True, '--seed': 1}
    """
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    lacking = (name for name in names if name not in settings)
    new = {name: defaults.get(name.removeprefix("--")) for name in lacking}
    return {name: value for name, value in new.items() if value is not None} | {**settings}


def without_ignored_flags(argv: Sequence[str], errors: list[str] | None = None) -> list[str]:
    """Return the command line without ignored flags, and with aliases replaced.

    Raises UserError for an optimizer other than AdamW; with a list `errors`, appends the error.

    >>> without_ignored_flags(["--lora_r", "4", "--lazy-preprocess", "True", "--fsdp", "a", "b"])
    ['--lora_r', '4']
    >>> without_ignored_flags(["--evaluation-strategy=epoch"])
    ['--eval_strategy=epoch']
    """
    words_left: list[str] = []
    for name, words in _groups(argv):
        value = words[0].partition("=")[2] or " ".join(words[1:])
        if name == "optim" and not value.startswith("adamw"):
            with collect_errors(errors):
                raise UserError(f"--optim: found {value}; expected adamw_torch, or leave it out.")
        if name in ALIASES:
            _, equals, value = words[0].partition("=")
            words = [f"--{ALIASES[name]}{equals}{value}", *words[1:]]
        words_left += [] if name in IGNORED_FLAGS else words
    return words_left


def ignored_flag_notes(argv: Sequence[str]) -> list[str]:
    """Return a note for each flag without effect on the command line or in the `--config` file.

    >>> ignored_flag_notes(["--optim", "adamw_torch"])
    ['note: --optim: the optimizer is always AdamW']
    """
    given = dict(_groups(argv))
    if "config" in given:
        file = Path(" ".join(given["config"][1:]) or given["config"][0].partition("=")[2])
        given |= yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    reasons = {name: IGNORED_FLAGS[name] for name in given if name in IGNORED_FLAGS}
    if not {"eval_data_path", "eval_fraction", "sample_prompts"} & {*given}:
        reasons |= {name: NO_EVALUATION_DATA for name in EVALUATION_FLAGS if name in given}
    return [f"note: --{name}: {why}" for name, why in reasons.items()]


def _groups(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag's name, and its words with the flag itself first."""
    words: list[str] = []
    for word in [*argv, "--"]:
        if word.startswith("--") and words:
            yield words[0].partition("=")[0].removeprefix("--").replace("-", "_"), words
            words = []
        words.append(word)


MAIN_JOB = ROOT / "loop" / "config" / "main_job.yaml"
C = TypeVar("C", bound=Config)


def read_config(
    argv: Sequence[str],
    config_type: type[C],
    description: str = "",
    errors: list[str] | None = None,
) -> C:
    """Return the run's settings from flags and YAML.

    Without a model, data and --config, the main job's settings apply. Raises UserError for an
    invalid value or a contradiction; with a list `errors`, appends each error and continues.
    """
    known = IGNORED_FLAGS, ALIASES, errors
    values = parse(config_type, without_ignored_flags(argv, errors), description, *known)
    if values.pop("config", None) is None and not {"model_name_or_path", "data_path"} & {*values}:
        values = parse(config_type, ["--config", str(MAIN_JOB)], description) | values
        values.pop("config")
    adapter = values.pop("lora_weight_path", None)
    if adapter:
        with collect_errors(errors):
            values |= _adapter_settings(Path(adapter).expanduser(), values)
            values["lora_weight_path"] = adapter
    config = config_type(**values)
    add_errors(_contradictions(config), errors)
    return config


def _contradictions(config: Config) -> Iterator[str]:
    """Yield an error for each contradiction between settings."""
    precisions = {name for name in ("bf16", "fp16") if getattr(config, name)}
    if config.mixed_precision and config.mixed_precision != "auto":
        precisions.add(config.mixed_precision)
    if len(precisions) > 1:
        yield (
            f"found both {' and '.join(sorted(precisions))}; expected one precision. "
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
            "--flash_attn: found precision no (fp32); FlashAttention-2 takes only bf16 and fp16. "
            "Give --mixed_precision bf16, or leave the flag out."
        )
    if config.num_data == 0:
        yield "--num_data: found 0; expected at least 1, or -1 for all dialogues."
    if config.max_steps == 0:
        yield "--max_steps: found 0; expected at least 1, or -1 to train by epochs."
    yield from _evaluation_contradictions(config)
    yield from _tracker_contradictions(config)
    if config.auto_micro_batch and config.tokens_per_micro_batch:
        yield (
            f"found --auto_micro_batch and --tokens_per_micro_batch {config.tokens_per_micro_batch}"
            "; expected only one of them: the first sets the second."
        )
    if config.global_batch_size and config.gradient_accumulation_steps:
        yield (
            f"found --global_batch_size {config.global_batch_size} and "
            f"--gradient_accumulation_steps {config.gradient_accumulation_steps}; expected one of "
            "them: the first determines the second."
        )


def _evaluation_contradictions(config: Config) -> Iterator[str]:
    if config.eval_data_path and config.eval_fraction:
        yield (
            f"found --eval_data_path and --eval_fraction {config.eval_fraction:g}; expected one of "
            "them: separate evaluation data, or a share of --data_path."
        )
    evaluates = (config.eval_data_path or config.eval_fraction) and config.eval_strategy != "no"
    if config.sample_prompts and config.eval_strategy == "no":
        yield (
            "--sample_prompts: found --eval_strategy no; expected evaluations, since prompts are "
            "answered there. Give --eval_strategy steps or epoch, or leave the prompts out."
        )
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(config, name) and not evaluates:
            yield (
                f"--{name}: found no evaluation; expected one. Give --eval_data_path or "
                "--eval_fraction, and --eval_strategy steps or epoch."
            )


def _tracker_contradictions(config: Config) -> Iterator[str]:
    if "none" in config.report_to and len(config.report_to) > 1:
        yield "--report_to: found none and a tracker; expected one or the other."
    if config.wandb_artifact and "wandb" not in config.report_to:
        yield "--wandb_artifact: found no wandb in --report_to. Give --report_to wandb."
    if any(not 1 <= len(tag) <= 64 for tag in config.tags or ()):
        yield "--tags: found a tag that wandb does not accept; expected 1 to 64 characters."


def _adapter_settings(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an existing adapter; raises UserError if a given flag differs."""
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
        raise UserError(
            f"--lora_weight_path: {file}: found no LoRA adapter; expected one saved by peft."
        )
    missing = {"r", "lora_alpha", "bias", "target_modules", "lora_dropout"} - {*saved}
    if missing:
        raise UserError(f"--lora_weight_path: {file}: lacks {', '.join(sorted(missing))}.")
    if not any((folder / name).is_file() for name in ADAPTER_FILES):
        raise UserError(
            f"--lora_weight_path {folder}: found no weights; expected {ADAPTER_FILES[0]}."
        )
    targets = saved["target_modules"]
    if not isinstance(saved["r"], int) or not isinstance(targets, str | list):
        raise UserError(
            f"--lora_weight_path: {file}: r or target_modules has a type that peft never writes."
        )
    # Experts, and matrices that are adapted as parameters (loop/model/lora_targets.py).
    parameters = [
        str(name).removesuffix(".weight") for name in saved.get("target_parameters") or ()
    ]
    names = [targets] if isinstance(targets, str) else sorted({*targets, *parameters})
    settings = {
        "lora_r": saved["r"],
        "lora_alpha": saved["lora_alpha"],
        "lora_bias": saved["bias"],
        "lora_target_modules": tuple(names),
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
    """Return the settings as YAML, which `--config` reads back."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    values["mixed_precision"] = config.precision
    header = "# Every setting of this run. To repeat the run, give this file to --config.\n"
    return header + yaml.safe_dump(values, sort_keys=False)
