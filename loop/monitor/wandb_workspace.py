"""`python -m loop dashboard`: a workspace at wandb whose panels show what this loop logs.

The panels are grouped: loss, speed, memory, samples. It needs wandb-workspaces and a login.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from loop.config.parser import File, flag, parse
from loop.monitor.trackers import PROJECT, SAMPLES, has_wandb_login

Lines = dict[str, tuple[str, ...]]  # a panel's title, and the keys that it draws
GROUPS: dict[str, Lines] = {
    "Loss": {
        "Loss, nats per supervised token": ("train/loss", "eval/loss"),
        "Learning rate": ("train/learning_rate",),
        "Gradient norm, before clipping": ("train/grad_norm",),
    },
    "Speed": {
        "Tokens/s": ("train/tokens_per_second",),
        "Supervised tokens/s": ("train/supervised_tokens_per_second",),
        "Supervised tokens trained on": ("train/supervised_tokens",),
    },
    "Memory": {"Peak memory, GiB": ("train/peak_memory_gib",)},
}
NOBODY = "entity"  # The package wants a name; what --out writes holds none.
COLUMNS = (
    *("summary:final_loss", "summary:best_eval_loss", "summary:seconds"),
    *("config:learning_rate.value", "config:lora_r.value"),
)


@dataclass(frozen=True)
class DashboardConfig:
    """Where the workspace goes."""

    entity: str | None = flag(
        None, "user or team at wandb; none: WANDB_ENTITY; not needed with --out", "dashboard"
    )
    project: str | None = flag(
        None, f"wandb's project; none: WANDB_PROJECT, or {PROJECT}", "dashboard"
    )
    name: str = flag("LoRA Loop", "the workspace's name", "dashboard")
    out: File | None = flag(
        None, "write its JSON to this file, and nothing to wandb: needs no login", "dashboard"
    )


def main(argv: Sequence[str]) -> None:
    """Make the workspace; raises UserError where that cannot be, with what to do."""
    values = parse(DashboardConfig, argv, __doc__ or "")
    values.pop("config", None)
    config = DashboardConfig(**values)
    entity = config.entity or os.environ.get("WANDB_ENTITY")
    project = config.project or os.environ.get("WANDB_PROJECT", PROJECT)
    if not entity and config.out:
        entity = NOBODY
    if not entity:
        raise UserError("--entity: found none; expected a user or team at wandb. Give --entity.")
    if not config.out:
        _check_reachable()
    made = workspace(entity, project, config.name)
    if config.out:
        _write(made, Path(config.out).expanduser())
        return
    try:
        made.save()
    except Exception as error:  # Of wandb's many kinds each is about login, names or the network.
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"wandb did not take the workspace for {entity}/{project}: {reason}. Look at the "
            "network, the login (wandb login) and both names; --out FILE needs none of them."
        ) from None


def _check_reachable() -> None:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise UserError(
            f"found WANDB_MODE={mode}; a workspace is made online. Unset it, or give --out FILE."
        )
    if not has_wandb_login():  # wandb would ask for a key, and wait.
        raise UserError(
            "found no login to wandb; expected one. Run wandb login, or give --out FILE."
        )


def workspace(entity: str, project: str, name: str) -> Any:
    """Return a wandb_workspaces Workspace of these groups, unsaved, without any network."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError(
            "the package wandb-workspaces is not installed. Install it: "
            "pip install wandb-workspaces"
        ) from None
    sections = [
        workspaces.Section(
            name=group,
            panels=[reports.LinePlot(title=title, x="Step", y=[*y]) for title, y in lines.items()],
            is_open=True,
            layout_settings=workspaces.SectionLayoutSettings(columns=len(lines), rows=1),
        )
        for group, lines in GROUPS.items()
    ]
    samples = workspaces.Section(
        name="Samples",
        panels=[reports.WeavePanelSummaryTable(table_name=SAMPLES)],
        is_open=True,
        layout_settings=workspaces.SectionLayoutSettings(columns=1, rows=1),
    )
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[*sections, samples],
        settings=workspaces.WorkspaceSettings(x_axis="Step", ignore_outliers=False),
        runset_settings=workspaces.RunsetSettings(pinned_columns=[*COLUMNS]),
    )


def _write(made: Any, file: Path) -> None:
    spec = made._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        file.write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written: {error.strerror}.") from None
    print(file)
