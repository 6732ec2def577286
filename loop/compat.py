"""FastChat's and transformers' flags that mean nothing here: accepted, with a line that says so."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from data.errors import UserError

EVALUATION = "there is no evaluation yet; training goes on without it"
SHARDING = "sharding is the accelerate config's; the like of it is accelerate_configs/zero3.yaml"
WITHOUT_MEANING = {
    "lazy_preprocess": "dialogues are always encoded before training, which takes seconds",
    "optim": "the optimizer is always AdamW",
    "eval_strategy": EVALUATION,
    "evaluation_strategy": EVALUATION,
    "eval_steps": EVALUATION,
    "eval_data_path": EVALUATION,
    "per_device_eval_batch_size": EVALUATION,
    "fsdp": SHARDING,
    "fsdp_config": SHARDING,
    "fsdp_transformer_layer_cls_to_wrap": SHARDING,
}


def without(argv: Sequence[str]) -> list[str]:
    """Return the command line without these flags and their values.

    Raises UserError for an optimizer that is not AdamW.

    >>> without(["--lora_r", "4", "--save-steps", "200", "--fsdp", "full_shard", "auto_wrap"])
    ['--lora_r', '4']
    """
    return [word for name, words in _groups(argv) if name not in WITHOUT_MEANING for word in words]


def notes(argv: Sequence[str]) -> list[str]:
    """Return one line for each of these flags that was given, on the line or in a YAML file.

    >>> notes(["--optim", "adamw_torch"])
    ['note: --optim: the optimizer is always AdamW']
    """
    given = dict(_groups(argv))
    if "config" in given:
        file = Path(" ".join(given["config"][1:]) or given["config"][0].partition("=")[2])
        given |= yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    return [f"note: --{name}: {WITHOUT_MEANING[name]}" for name in given if name in WITHOUT_MEANING]


def _groups(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag's name with its words."""
    words: list[str] = []
    for word in [*argv, "--"]:
        if word.startswith("--") and words:
            flag, _, value = words[0].partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            value = value or " ".join(words[1:])
            if name == "optim" and not value.startswith("adamw"):
                raise UserError(f"--optim: found {value}; expected adamw_torch, or leave it out.")
            yield name, words
            words = []
        words.append(word)
