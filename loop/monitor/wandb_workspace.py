"""`python -m loop dashboard`: creates a wandb workspace with panels for this loop's metrics.

Panel groups: loss, speed, memory, samples. Requires wandb-workspaces and a wandb login.
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

Lines = dict[str, tuple[str, ...]]  # a panel's title and its metrics
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
PLACEHOLDER = "entity"  # wandb-workspaces requires a name; the JSON of --out omits it.
COLUMNS = (
    *("summary:final_loss", "summary:best_eval_loss", "summary:seconds"),
    *("config:learning_rate.value", "config:lora_r.value"),
)


@dataclass(frozen=True)
class DashboardConfig:
    """Where the workspace is created."""

    entity: str | None = flag(
        None, "wandb user or team; none: WANDB_ENTITY; not needed with --out", "dashboard"
    )
    project: str | None = flag(
        None, f"wandb project; none: WANDB_PROJECT, or {PROJECT}", "dashboard"
    )
    name: str = flag("LoRA Loop", "the workspace's name", "dashboard")
    out: File | None = flag(
        None, "write the workspace as JSON to this file instead; needs no login", "dashboard"
    )


def main(argv: Sequence[str]) -> None:
    """Create the workspace; raises UserError if it cannot be created."""
    values = parse(DashboardConfig, argv, __doc__ or "")
    values.pop("config", None)
    config = DashboardConfig(**values)
    entity = config.entity or os.environ.get("WANDB_ENTITY")
    project = config.project or os.environ.get("WANDB_PROJECT", PROJECT)
    if not entity and config.out:
        entity = PLACEHOLDER
    if not entity:
        raise UserError("--entity: found none; expected a wandb user or team. Give --entity.")
    if not config.out:
        _check_reachable()
    created = workspace(entity, project, config.name)
    if config.out:
        _write(created, Path(config.out).expanduser())
        return
    try:
        created.save()
    except Exception as error:  # wandb raises many types: for login, names, network.
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"wandb rejected the workspace for {entity}/{project}: {reason}. Check the network, "
            "the login (wandb login), --entity and --project. --out FILE needs none of them."
        ) from None


def _check_reachable() -> None:
    mode = os.environ.get("WANDB_MODE", "online")
    if mode != "online":
        raise UserError(f"found WANDB_MODE={mode}; expected online. Unset it, or give --out FILE.")
    if not has_wandb_login():  # wandb would prompt for a key and wait.
        raise UserError("found no wandb login; expected one. Run wandb login, or give --out FILE.")


def workspace(entity: str, project: str, name: str) -> Any:
    """Return an unsaved Workspace with the panels of `GROUPS`; uses no network."""
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


def _write(created: Any, file: Path) -> None:
    spec = created._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    try:
        file.write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {file}: cannot be written: {error.strerror}.") from None
    print(file)
