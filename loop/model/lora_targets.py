"""Which modules get a LoRA pair: the names asked for, or the attention's as the model has them."""

from collections.abc import Iterable
from typing import Any

from data.errors import UserError

# LLaMA's and BART's names of query and value, and T5's.
USUAL = (("q_proj", "v_proj"), ("q", "v"))
ALL_LINEAR = ("all-linear",)


def target_names(model: Any, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the targets, each of which matches a module; none asked for: query and value.

    Raises UserError for one that matches nothing.
    """
    from torch import nn  # here, since the estimate of a wrong accelerate config needs none

    if asked == ALL_LINEAR:
        return asked
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    wanted = asked or next(
        (usual for usual in USUAL if all(_has(names, t) for t in usual)), USUAL[0]
    )
    for target in wanted:
        if not _has(names, target):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(
                f"--lora_target_modules: nothing in the model is named {target}. It has: {known}; "
                "or give all-linear."
            )
    return wanted


def _has(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
