"""Writes the tables of layouts and default LoRA targets in docs/models.md.

python -m tests.support.target_table
"""

from collections import defaultdict
from pathlib import Path

from data.errors import UserError
from loop.model.lora_targets import ALL_LINEAR, find_targets
from tests.support.architectures import UNBUILT, Outcome, outcomes, reason_of
from tests.support.tiny_models import architectures, tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LAYOUT_HEAD = "| training | architectures (`model_type`) |\n|---|---|\n"
HEAD = "| default targets | architectures (`model_type`) |\n|---|---|\n"


def target_table() -> str:
    """Return the table; `*` marks architectures whose experts are parameters."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for kind, tasks in architectures().items():
        try:
            model = tiny_model(kind, tasks[-1])
        except Exception:  # needs a package that is not installed, or has no text model
            kinds["not built by the sweep"].append(kind)
            continue
        experts = any("expert" in n for n in find_targets(model, ALL_LINEAR).parameters)
        try:
            names = sorted({n.rpartition(".")[2] for n in find_targets(model, None).modules})
            targets = " ".join(f"`{name}`" for name in names)
        except UserError:
            targets = "none: give `--lora_target_modules`"
        kinds[targets].append(kind + "*" * experts)
    rows = sorted(kinds.items(), key=lambda row: (-len(row[1]), row[0]))
    return HEAD + "".join(f"| {name} | {', '.join(found)} |\n" for name, found in rows)


def layout_table(found: dict[str, Outcome]) -> str:
    """Return the table of what training does with each architecture; `+`: all logits at once."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, one in found.items():
        refused = one.result == "refused"
        how = f"refused: {reason_of(one)}" if refused else one.layout
        kinds[how].append(f"{name}{'' if refused or one.chunks else '+'}")
    for name, reason in UNBUILT.items():
        kinds[f"not built by the sweep: {reason}"].append(name)
    rows = sorted(kinds.items(), key=lambda row: (-len(row[1]), row[0]))
    return LAYOUT_HEAD + "".join(f"| {how} | {', '.join(names)} |\n" for how, names in rows)


def main() -> None:
    """Replace the tables in the page."""
    for head, table in ((LAYOUT_HEAD, layout_table(outcomes())), (HEAD, target_table())):
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(head)
        after = rest[rest.index("\n\n") + 1 :] if "\n\n" in rest else ""
        PAGE.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
