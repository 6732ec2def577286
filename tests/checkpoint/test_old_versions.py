"""A checkpoint and an adapter of an older version still resume and load.

`fixtures/commit_9760489` was written by that commit, the last one before the packages: a random
Llama of two layers, five dialogues, a run stopped after step 3 of 6, and the same run finished.
Its training_config.yaml and manifest.json have the old flag names.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from data.files.hashes import HASH_VERSION
from loop.checkpoint.identity import VERSION_FACT
from loop.checkpoint.run_folder import is_finished
from loop.config.flags import Config
from loop.config.load import ALIASES, read_config
from tests.support.helpers import ROOT, adapter_of, command, log_of

FIXTURE = Path(__file__).parent / "fixtures" / "commit_9760489"


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture in a temporary folder, which becomes the working folder."""
    folder = shutil.copytree(FIXTURE, tmp_path / "moved")
    monkeypatch.chdir(folder)
    return folder


def printed(run: Path) -> list[tuple[int, str]]:
    """Return the logged losses with as many digits as on the console."""
    return [(entry["step"], f"{entry['loss']:.4f}") for entry in log_of(run)]


def test_the_fixture_has_the_old_flag_names() -> None:
    settings = yaml.safe_load((FIXTURE / "stopped/training_config.yaml").read_text())
    old = {*ALIASES} - {"evaluation_strategy"}
    assert old <= {*settings}
    assert not {ALIASES[name] for name in old} & {*settings}
    manifest = json.loads((FIXTURE / "stopped/checkpoint-3/manifest.json").read_text())
    assert "--supervise" in manifest["facts"]


def test_an_old_checkpoint_resumes_to_the_losses_and_adapter_of_the_old_version(
    moved: Path,
) -> None:
    settings = ("--config", "stopped/training_config.yaml")
    done = command("python", ROOT / "loop/train.py", *settings, cwd=moved)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-3, after step 3 of 6" in done.stdout
    assert printed(moved / "stopped") == printed(moved / "finished")
    assert [step for step, _ in printed(moved / "stopped")] == [1, 2, 3, 4, 5, 6]
    resumed, finished = adapter_of(moved / "stopped"), adapter_of(moved / "finished")
    assert {*resumed} == {*finished}
    for name, tensor in finished.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-5)


def test_an_old_checkpoint_of_other_data_is_refused_and_a_new_one_has_versioned_hashes(
    moved: Path,
) -> None:
    settings = ("--config", "stopped/training_config.yaml")
    text = (moved / "dialogues.json").read_text()
    (moved / "dialogues.json").write_text(text + "\n")
    done = command("python", ROOT / "loop/train.py", *settings, cwd=moved)
    assert done.returncode == 2
    assert "data (SHA-256) was" in done.stderr + done.stdout
    assert "tokenizer (SHA-256) was" not in done.stderr + done.stdout
    (moved / "dialogues.json").write_text(text)
    done = command("python", ROOT / "loop/train.py", *settings, cwd=moved)
    assert done.returncode == 0, done.stderr
    facts = json.loads((moved / "stopped/checkpoint-6/manifest.json").read_text())["facts"]
    assert facts[VERSION_FACT] == HASH_VERSION
    old = json.loads((FIXTURE / "stopped/checkpoint-3/manifest.json").read_text())["facts"]
    for name in ("data (SHA-256)", "tokenizer (SHA-256)", "base model (sampled SHA-256)"):
        assert facts[name] != old[name]
    assert is_finished(read_config([*settings], Config))


@pytest.mark.usefixtures("moved")
def test_an_old_finished_run_is_recognised() -> None:
    assert is_finished(read_config(["--config", "finished/training_config.yaml"], Config))


@pytest.mark.parametrize("folder", ["finished", "stopped/checkpoint-3"])
def test_peft_loads_an_old_adapter(folder: str, moved: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(moved / "model")
    loaded = PeftModel.from_pretrained(base, moved / folder).state_dict()
    for name, tensor in adapter_of(moved / folder).items():
        own = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
        assert torch.equal(loaded[own], tensor)
        assert tensor.any()
