"""The conversion of the bundled model is atomic."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.helpers import HANG, ROOT

NAME = "SmolLM2-135M-Instruct"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the project's code without the converted model."""
    for folder in ("loop", "data"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return tmp_path


# The conversion copies the licence last.
KILLED = """
import os, shutil, signal
from loop.model import bundled_model
shutil.copy = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
bundled_model.embedded_model()
"""


def convert(copy: Path, *how: str) -> subprocess.Popen[str]:
    command = [sys.executable, *(how or ("-m", "loop.model.bundled_model"))]
    return subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_model_and_two_at_once_convert_once(copy: Path) -> None:
    models = copy / "models"
    killed = convert(copy, "-c", KILLED)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [*models.glob("*.partial/*.safetensors")]
    assert not (models / NAME).exists()

    outputs = [process.communicate(timeout=HANG)[0] for process in (convert(copy), convert(copy))]
    assert sorted(output.count("Converting") for output in outputs) == [0, 1]
    names = {path.name for path in (models / NAME).iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert not [*models.glob("*.partial")]
    assert "Apache License" in (models / NAME / "LICENSE").read_text()
