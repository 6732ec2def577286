"""The conversion of the bundled model is atomic."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.helpers import ROOT

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the project's code without the converted model."""
    for folder in ("loop", "data"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


def convert(copy: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "loop.model.bundled_model"]
    return subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_model_and_two_at_once_convert_once(copy: Path) -> None:
    models = copy / "models"
    killed = convert(copy)
    deadline = time.monotonic() + 120
    while not [*models.glob("*.partial/*")] and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [*models.glob("*.partial/*")], "killed before or after the conversion wrote its files"
    assert not (models / NAME).exists()

    outputs = [process.communicate(timeout=300)[0] for process in (convert(copy), convert(copy))]
    assert sorted(output.count("Converting") for output in outputs) == [0, 1]
    names = {path.name for path in (models / NAME).iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert not [*models.glob("*.partial")]
    assert "Apache License" in (models / NAME / "LICENSE").read_text()
