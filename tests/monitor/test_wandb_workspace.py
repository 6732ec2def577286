"""The wandb workspace has panels for the logged metrics; tested without a network."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from loop.monitor import wandb_workspace
from loop.monitor.trackers import SAMPLES
from tests.support.helpers import command, log_of

NOT_IN_EVERY_RUN = {"eval/loss"}


def metrics(section: Any) -> list[list[str]]:
    return [panel["config"].get("metrics", []) for panel in section["panels"]]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The workspace that the command writes with --out, parsed."""
    file = tmp_path_factory.mktemp("workspace") / "workspace.json"
    none = {"WANDB_ENTITY": "", "WANDB_MODE": "offline"}
    done = command("python", "-m", "loop", "dashboard", "--out", file, **none)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{file}\n"
    return json.loads(file.read_text())


def test_the_workspace_groups_loss_speed_memory_and_samples(spec: Any) -> None:
    bank = spec["section"]["panelBankConfig"]
    sections = {section["name"]: section for section in bank["sections"]}
    assert [*sections] == ["Loss", "Speed", "Memory", "Samples"]
    assert all(section["isOpen"] for section in sections.values())
    assert metrics(sections["Loss"])[0] == ["train/loss", "eval/loss"]
    assert metrics(sections["Memory"]) == [["train/peak_memory_gib"]]
    (samples,) = sections["Samples"]["panels"]
    assert f'"{SAMPLES}"' in json.dumps(samples)
    assert spec["section"]["settings"]["shouldAutoGeneratePanels"] is False
    columns = spec["section"]["runSets"][0]["runFeed"]["columnPinned"]
    assert columns["summary:final_loss"]
    assert columns["config:lora_r.value"]


def test_every_panel_metric_is_logged_by_a_run(spec: Any, train: Callable[..., Path]) -> None:
    logged = {f"train/{key}" for key in log_of(train("run"))[-1]}
    sections = spec["section"]["panelBankConfig"]["sections"]
    drawn = {key for section in sections for keys in metrics(section) for key in keys}
    assert drawn - logged == NOT_IN_EVERY_RUN


@pytest.mark.filterwarnings("ignore:Pydantic V1")
def test_wandbs_own_library_reads_the_workspace_back(spec: Any) -> None:
    from wandb_workspaces.workspaces import Workspace
    from wandb_workspaces.workspaces.internal import View, WorkspaceViewspec

    read = WorkspaceViewspec.model_validate_json(json.dumps(spec))
    view = View(entity="e", project="p", display_name="n", name="x", id="", spec=read)
    (made, again) = (wandb_workspace.workspace("e", "p", "n"), Workspace._from_model(view))
    for one, other in zip(made.sections, again.sections, strict=True):
        assert (one.name, len(one.panels)) == (other.name, len(other.panels))
    panels = again.sections[0].panels
    drawn = [[metric.name for metric in panel.y] for panel in panels]
    assert drawn == [[*keys] for keys in wandb_workspace.GROUPS["Loss"].values()]


def test_a_missing_login_entity_or_package_is_an_error_without_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))

    def refused(message: str, *words: str) -> None:
        with pytest.raises(UserError, match=re.escape(message)):
            wandb_workspace.main(words)

    refused("--entity: found none")
    refused("found no wandb login; expected one. Run wandb login", "--entity", "e")
    refused("cannot be written", "--entity", "e", "--out", str(tmp_path / "no/such/file"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    refused("found WANDB_MODE=offline", "--entity", "e")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    refused("pip install wandb-workspaces", "--entity", "e", "--out", str(tmp_path / "file"))


@pytest.mark.slow
def test_an_unreachable_wandb_is_one_error_message(tmp_path: Path) -> None:
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    done = command("python", "-m", "loop", "dashboard", "--entity", "e", **nowhere)
    assert done.returncode == 2
    assert "wandb rejected the workspace for e/lora-loop: " in done.stderr
    assert "Traceback" not in done.stderr
