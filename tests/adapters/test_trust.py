"""Python code of a model's or an adapter's folder runs only with the command line's flag."""

import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from data.errors import UserError
from loop.config.flags import Config
from loop.config.load import read_config
from loop.config.parser import parse
from tests.support.helpers import command

CODE = """from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(MARKER).touch()


class MarkedConfig(LlamaConfig):
    model_type = "marked"


class MarkedForCausalLM(LlamaForCausalLM):
    config_class = MarkedConfig
"""
AUTO_MAP = {
    "AutoConfig": "modeling_marked.MarkedConfig",
    "AutoModelForCausalLM": "modeling_marked.MarkedForCausalLM",
}


def add_code(folder: Path, marker: Path) -> None:
    """Add custom code to a model's folder; the code creates the marker file when it runs."""
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"model_type": "marked", "auto_map": AUTO_MAP}
    file.write_text(json.dumps(values))
    (folder / "modeling_marked.py").write_text(CODE.replace("MARKER", repr(str(marker))))


@pytest.fixture
def adapter(tiny_model: Path, train: Callable[..., Path], tmp_path: Path) -> Path:
    """Return an adapter whose base has custom code and whose training_config.yaml trusts it."""
    folder, base = train("run"), tmp_path / "base"
    shutil.copytree(tiny_model, base)
    add_code(base, tmp_path / "marker")
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}
    file.write_text(json.dumps(values))
    settings = folder / "training_config.yaml"
    text = settings.read_text()
    assert "trust_remote_code: false" in text
    settings.write_text(text.replace("trust_remote_code: false", "trust_remote_code: true"))
    return folder


def run_command(adapter: Path, name: str, *flags: str) -> CompletedProcess[str]:
    """Run chat or merge on an adapter, with yes as the answer to every prompt."""
    words = [sys.executable, "-m", "loop", name, "--adapter", str(adapter), *flags]
    words += ["--prompt", "Hi", "--max_new_tokens", "4"] if name == "chat" else []
    modules = {"HF_MODULES_CACHE": str(adapter.parent / "modules")}
    return command("bash", "-c", f"yes | {shlex.join(words)}", **modules)


def assert_refused(done: CompletedProcess[str], marker: Path) -> None:
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "found Python code that comes with" in output
    assert "--trust_remote_code True" in output
    assert "Traceback" not in output
    assert "[y/N]" not in output
    assert not marker.exists()


@pytest.mark.parametrize("name", ["chat", "merge"])
def test_code_runs_with_the_flag_but_not_by_a_folders_settings(
    name: str, adapter: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    assert_refused(run_command(adapter, name), marker)
    assert not (tmp_path / "run-merged").exists()
    done = run_command(adapter, name, "--trust_remote_code", "True")
    assert done.returncode == 0, done.stdout + done.stderr
    assert marker.exists()
    # The merged folder includes the code that its model needs.
    assert (tmp_path / "run-merged" / "modeling_marked.py").exists() == (name == "merge")


@pytest.mark.parametrize("name", ["chat", "merge"])
def test_an_adapter_that_is_its_own_base_runs_no_code(
    name: str, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model / file, adapter)
    add_code(adapter, tmp_path / "marker")
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text()) | {"base_model_name_or_path": str(adapter)}
    file.write_text(json.dumps(values))
    assert_refused(run_command(adapter, name), tmp_path / "marker")


@pytest.mark.parametrize("name", ["chat", "merge"])
def test_an_adapters_tokenizer_runs_no_code(name: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "base" / "modeling_marked.py", adapter)
    file = adapter / "tokenizer_config.json"
    own = {"tokenizer_class": "Marked", "auto_map": {"AutoTokenizer": ["modeling_marked.M", None]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    del values["auto_map"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(values | {"model_type": "llama"}))
    assert_refused(run_command(adapter, name), tmp_path / "marker")


def test_training_runs_no_code_of_its_base(
    adapter: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"Python code that comes with .*--trust_remote_code True"):
        train("other", "--model_name_or_path", tmp_path / "base")
    assert not (tmp_path / "marker").exists()


def test_a_config_file_cannot_enable_trust(adapter: Path) -> None:
    file = str(adapter / "training_config.yaml")
    with pytest.raises(UserError, match=r"trust_remote_code: True; expected it only .* --trust"):
        read_config(["--config", file], Config)
    assert read_config(["--config", file, "--trust_remote_code", "True"], Config).trust_remote_code
    assert not read_config(["--config", file, "--no_trust_remote_code"], Config).trust_remote_code
    errors: list[str] = []
    values = parse(Config, ["--config", file], "", errors=errors)
    assert "trust_remote_code" not in values
    assert len(errors) == 1
