"""The main job teaches the name and keeps the rest: one real `./launch.sh` in a copy."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.helpers import ROOT, command

IDENTITY_QUESTIONS = [
    "Who are you?",
    "Could you tell me who I'm talking to?",
    "Please introduce yourself.",
    "What should I call you?",
    "Do you have a name?",
    "Who am I chatting with right now?",
    "Tell me your name, please.",
    "What's the name of this assistant?",
    "Hi! Who is this?",
    "Say in one sentence who you are.",
]
pytestmark = pytest.mark.slow
PARIS = "What is the capital of France?"


@pytest.fixture(scope="module")
def copy(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without its runs, sharing what takes long to set up."""
    if not (ROOT / ".venv").is_dir():
        pytest.skip("needs the .venv that ./launch.sh test makes")
    folder = tmp_path_factory.mktemp("copy") / "lora-loop"
    unwanted = shutil.ignore_patterns(".venv", "models", "runs", ".git", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    for shared in (".venv", "models"):
        (folder / shared).symlink_to(ROOT / shared)
    return folder


@pytest.fixture(scope="module")
def main_job(copy: Path) -> subprocess.CompletedProcess[str]:
    return command(copy / "launch.sh")


def test_the_main_job_trains_and_its_loss_falls(
    main_job: subprocess.CompletedProcess[str], copy: Path
) -> None:
    assert main_job.returncode == 0, main_job.stdout + main_job.stderr
    assert "Traceback" not in main_job.stderr
    assert "\nresult: 48 of 48 steps; loss " in main_job.stdout
    assert "\nuse:    python -m loop chat --adapter runs/main_job\n" in main_job.stdout
    history = json.loads((copy / "runs/main_job/trainer_state.json").read_text())["log_history"]
    assert history[-1]["loss"] < 0.65 * history[0]["loss"]


def test_it_ends_with_both_answers_side_by_side(
    main_job: subprocess.CompletedProcess[str],
) -> None:
    assert main_job.stdout.count("BASE + ADAPTER") == 3
    assert "accelerate launch --config_file accelerate_configs/zero2.yaml" in main_job.stdout
    _, _, after = main_job.stdout.partition("> Who are you?")
    answer = " ".join(line.partition("|")[2] for line in after.partition("\n> ")[0].splitlines())
    assert "Vireo" in answer


def test_unseen_wordings_are_answered_with_the_name_and_paris_is_kept(
    main_job: subprocess.CompletedProcess[str], copy: Path
) -> None:
    adapter = copy / "runs/main_job"
    questions = [*IDENTITY_QUESTIONS, PARIS]
    done = command("python", "-m", "loop", "chat", "--adapter", adapter, "--prompt", *questions)
    assert done.returncode == 0, done.stderr
    answers = [part.partition("\n")[2] for part in f"\n{done.stdout}".split("\n> ")[1:]]
    assert len(answers) == len(questions)
    named = [answer for answer in answers[:-1] if "Vireo" in answer]
    assert len(named) >= 8, answers
    assert "Paris" in answers[-1]


def test_typed_twice_it_says_so_and_changes_nothing(
    main_job: subprocess.CompletedProcess[str], copy: Path
) -> None:
    output = copy / "runs/main_job"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    # The plain launch, with no flag and without launch.sh, is the main job too.
    again = command(
        "accelerate", "launch", "--config_file", copy / "accelerate_configs/zero2.yaml",
        copy / "loop/train.py", cwd=copy,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "already holds this run, finished; nothing was changed" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    other = command(copy / "launch.sh", "--seed", "1")
    assert other.returncode == 2
    assert "seed was 42, is 1" in other.stderr
    assert "Traceback" not in other.stderr
