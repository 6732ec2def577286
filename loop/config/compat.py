"""FastChat's and transformers' flags that mean nothing here: accepted, with a line that says so."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from data.errors import UserError, noted

SHARDING = "sharding is the accelerate config's; the like of it is accelerate_configs/zero3.yaml"
WITHOUT_MEANING = {
    "lazy_preprocess": "dialogues are always encoded before training, which takes seconds",
    "optim": "the optimizer is always AdamW",
    "fsdp": SHARDING,
    "fsdp_config": SHARDING,
    "fsdp_transformer_layer_cls_to_wrap": SHARDING,
}

EVALUATION = ("eval_steps", "per_device_eval_batch_size")
NOTHING_HELD_OUT = "there is nothing to evaluate on; --eval_data_path or --eval_fraction gives it"
# Other names of flags that are understood.
ALIASES = {"evaluation_strategy": "eval_strategy", "load_best_model_at_end": "load_best_at_end"}


def without(argv: Sequence[str], mistakes: list[str] | None = None) -> list[str]:
    """Return the command line without these flags and their values, others by our names.

    Raises UserError for an optimizer that is not AdamW, or adds it to `mistakes`.

    >>> without(["--lora_r", "4", "--lazy-preprocess", "True", "--fsdp", "full_shard", "auto_wrap"])
    ['--lora_r', '4']
    >>> without(["--evaluation-strategy=epoch"])
    ['--eval_strategy=epoch']
    """
    kept: list[str] = []
    for name, words in _groups(argv):
        value = words[0].partition("=")[2] or " ".join(words[1:])
        if name == "optim" and not value.startswith("adamw"):
            with noted(mistakes):
                raise UserError(f"--optim: found {value}; expected adamw_torch, or leave it out.")
        if name in ALIASES:
            _, equals, value = words[0].partition("=")
            words = [f"--{ALIASES[name]}{equals}{value}", *words[1:]]
        kept += [] if name in WITHOUT_MEANING else words
    return kept


def notes(argv: Sequence[str]) -> list[str]:
    """Return one line for each of these flags that was given, on the line or in a YAML file.

    >>> notes(["--optim", "adamw_torch"])
    ['note: --optim: the optimizer is always AdamW']
    """
    given = dict(_groups(argv))
    if "config" in given:
        file = Path(" ".join(given["config"][1:]) or given["config"][0].partition("=")[2])
        given |= yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    told = {name: WITHOUT_MEANING[name] for name in given if name in WITHOUT_MEANING}
    if not {"eval_data_path", "eval_fraction", "sample_prompts"} & {*given}:
        told |= {name: NOTHING_HELD_OUT for name in EVALUATION if name in given}
    return [f"note: --{name}: {why}" for name, why in told.items()]


def _groups(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag's name with its words."""
    words: list[str] = []
    for word in [*argv, "--"]:
        if word.startswith("--") and words:
            yield words[0].partition("=")[0].removeprefix("--").replace("-", "_"), words
            words = []
        words.append(word)
