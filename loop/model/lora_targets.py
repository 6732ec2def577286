"""The modules that LoRA adapts: --lora_target_modules, or attention's query and value."""

from collections.abc import Iterable
from typing import Any

from data.errors import UserError

# Names of query and value projections: in LLaMA and BART, and in T5.
USUAL = (("q_proj", "v_proj"), ("q", "v"))
ALL_LINEAR = ("all-linear",)


def target_names(model: Any, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of the modules to adapt; the default is query and value.

    Raises UserError for a name that matches no module.
    """
    from torch import nn  # Imported here, since it is slow and not all importers call this.

    if asked == ALL_LINEAR:
        return asked
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    wanted = asked or next(
        (usual for usual in USUAL if all(_has(names, name) for name in usual)), USUAL[0]
    )
    for target in wanted:
        if not _has(names, target):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(
                f"--lora_target_modules: found {target}, which names no module of the model; "
                f"expected some of: {known}. Give one of these, or all-linear."
            )
    return wanted


def _has(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
