"""The modules that LoRA adapts: --lora_target_modules, or the attention's query and value."""

from collections.abc import Iterable
from typing import Any

from data.errors import UserError

# Query and value: LLaMA's and BART's names, T5's names.
USUAL = (("q_proj", "v_proj"), ("q", "v"))
ALL_LINEAR = ("all-linear",)


def target_names(model: Any, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the names of the modules to adapt; the default is query and value.

    Raises UserError for a name that matches no module.
    """
    from torch import nn  # Here: the import is slow, and not every importer calls this.

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
                f"--lora_target_modules: nothing in the model is named {target}; expected some of: "
                f"{known}. Give one of these, or all-linear."
            )
    return wanted


def _has(names: Iterable[str], target: str) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)
