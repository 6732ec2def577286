"""The --help of each command lists every flag by group, with its value and its default."""

import importlib
import re

import pytest

from data.__main__ import COMMANDS
from loop.adapters.chat import ChatConfig
from loop.adapters.merge import MergeConfig
from loop.config.flags import Config
from loop.config.parser import parse
from loop.doctor.command import DoctorConfig
from loop.doctor.show import ShowConfig
from loop.monitor.plots import PlotConfig
from loop.monitor.wandb_workspace import DashboardConfig

CONFIGS = (Config, ShowConfig, DoctorConfig, ChatConfig, MergeConfig, PlotConfig, DashboardConfig)
# The lines of a flag: its name, its value, and its text, which may start on the next line.
FLAG = re.compile(r"^  (--\w+)((?: \S+)*?)(?:  +|\n +)((?:\S.*)(?:\n {8,}\S.*)*)", re.MULTILINE)


def flags_of(text: str) -> dict[str, tuple[str, str]]:
    """Return the value and the help text of each flag; the text is joined to one line."""
    return {
        name: (takes, " ".join(help_text.split())) for name, takes, help_text in FLAG.findall(text)
    }


def help_of(config: type, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        parse(config, ["--help"], "`python -m loop x`: does something.")
    return capsys.readouterr().out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_flag_of_loop_has_a_value_and_a_default(
    config: type, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(config, capsys)
    assert text.startswith("usage: python -m loop x [--flag value ...]\n\nDoes something.\n")
    found = flags_of(text)
    assert {*found} == {f"--{name}" for name in ("config", *config.__dataclass_fields__)}
    for name, (takes, help_text) in found.items():
        assert takes, name
        assert "(default: " in help_text or "none: " in help_text or name == "--config", (
            name,
            help_text,
        )


def test_training_flags_are_grouped_and_numbers_have_their_unit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = help_of(Config, capsys)
    groups = ["model", "LoRA", "data", "training", "output", "checkpoints", "evaluation"]
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == ["options", *groups]
    found = flags_of(text)
    units = {name: takes.strip() for name, (takes, _) in found.items()}
    assert units["--model_max_length"] == "TOKENS"
    assert units["--save_minutes"] == "MINUTES"
    assert units["--warmup_ratio"] == "SHARE"
    assert units["--output_dir"] == "FOLDER"
    assert units["--data_path"] == "FILE ..."


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "look"])
def test_every_flag_of_data_has_a_value_and_a_default(name: str) -> None:
    text = importlib.import_module(f"data.preparation.{name}").flags().format_help()
    assert text.startswith(f"usage: python -m data {name} --in FILE ...")
    assert {"files", "execution", name} <= {*re.findall(r"^(\w[\w ]+):$", text, re.MULTILINE)}
    found = flags_of(text)
    assert len(found) >= 8
    required = {"--in", "--out" if name != "stats" else "", "--model_name_or_path"}
    for flag, (takes, help_text) in found.items():
        assert takes, flag
        assert "default" in help_text or flag in required, (flag, help_text)


def test_look_takes_files_and_its_flag_has_a_default() -> None:
    text = importlib.import_module("data.preparation.look").flags().format_help()
    assert text.startswith("usage: python -m data look FILE ...")
    assert "default" in text.partition("--records N")[2]
