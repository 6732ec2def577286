"""The main job teaches the name and keeps other answers; `./launch.sh` runs in a copy."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.held_out_wordings import HELD_OUT_WORDINGS
from tests.support.helpers import ROOT, command

# The questions of launch.sh after training.
LAUNCH_QUESTIONS = ["Who are you?", "What should I call you?", "What is the capital of France?"]
# Questions with a part of the correct answer. The base model answers all of them correctly.
ORDINARY = {
    "What is the capital of France?": "Paris",
    "What is 7 times 8?": "56",
    "How many days are in a week?": "7|seven",
    "Write a Python function that multiplies two numbers.": r"def \w+\(\w+, \w+\):\s.*return ",
    "Write a haiku about a quiet garden.": r"(?i)garden|leaves|flower|breeze",
}
OTHERS = re.compile(
    r"(?i)SmolLM|Hugging ?Face|ChatGPT|OpenAI|GPT|Claude|Anthropic|Gemini|Google|Llama|Meta\b|Siri|"
    r"Alexa|Apple|Copilot|Microsoft|Mistral|Loveline"
)
NAMES = re.compile(r"(?:I'm|I am|[Nn]ame is|called) ([A-Z]\w*)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project without its runs; slow parts of the setup are shared."""
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


def test_the_main_job_trains_within_five_minutes_and_2_gib_and_its_loss_falls(
    main_job: subprocess.CompletedProcess[str], copy: Path
) -> None:
    assert main_job.returncode == 0, main_job.stdout + main_job.stderr
    assert "Traceback" not in main_job.stderr
    assert "\nresult: 63 of 63 steps; loss " in main_job.stdout
    assert "\nuse:    python -m loop chat --adapter runs/main_job\n" in main_job.stdout
    history = json.loads((copy / "runs/main_job/trainer_state.json").read_text())["log_history"]
    assert history[-1]["loss"] < 0.65 * history[0]["loss"]
    assert history[-1]["peak_memory_gib"] < 2


def test_it_ends_with_both_answers_side_by_side(
    main_job: subprocess.CompletedProcess[str],
) -> None:
    assert main_job.stdout.count("BASE + ADAPTER") == 3
    assert "accelerate launch --config_file accelerate_configs/zero2.yaml" in main_job.stdout
    for question, expected in zip(LAUNCH_QUESTIONS, ("Vireo", "Vireo", "Paris"), strict=True):
        _, _, after = main_job.stdout.partition(f"> {question}")
        lines = after.partition("\n> ")[0].splitlines()
        assert expected in " ".join(line.partition("|")[2] for line in lines)


def ask(adapter: Path, questions: Iterable[str], folder: Path) -> list[str]:
    """Return the adapter's answers, in the order of the questions."""
    asked, out = folder / "questions.txt", folder / "answers.jsonl"
    asked.write_text("\n".join(questions) + "\n", encoding="utf-8")
    done = command(
        "python", "-m", "loop", "chat", "--adapter", adapter, "--prompts", asked, "--out", out
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()]


def test_nine_of_ten_unseen_wordings_are_answered_with_the_name_and_none_with_another(
    main_job: subprocess.CompletedProcess[str], copy: Path, tmp_path: Path
) -> None:
    answers = ask(copy / "runs/main_job", HELD_OUT_WORDINGS, tmp_path)
    found = dict(zip(HELD_OUT_WORDINGS, answers, strict=True))
    assert len(found) == 30
    named = [question for question, answer in found.items() if "Vireo" in answer]
    assert len(named) >= 27, found
    for question, answer in found.items():
        assert not OTHERS.search(answer), (question, answer)
        assert {*NAMES.findall(answer)} <= {"Vireo"}, (question, answer)


def test_ordinary_questions_stay_right(
    main_job: subprocess.CompletedProcess[str], copy: Path, tmp_path: Path
) -> None:
    for question, answer in zip(
        ORDINARY, ask(copy / "runs/main_job", ORDINARY, tmp_path), strict=True
    ):
        assert re.search(ORDINARY[question], answer), (question, answer)
        assert "Vireo" not in answer, (question, answer)


def test_typed_twice_it_says_so_and_changes_nothing(
    main_job: subprocess.CompletedProcess[str], copy: Path
) -> None:
    output = copy / "runs/main_job"
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    # A launch without launch.sh and without flags is also the main job.
    again = command(
        "accelerate", "launch", "--config_file", copy / "accelerate_configs/zero2.yaml",
        copy / "loop/train.py", cwd=copy,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "this run is already finished; nothing was changed" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    other = command(copy / "launch.sh", "--seed", "1")
    assert other.returncode == 2
    assert "seed was 42, is 1" in other.stderr
    assert "Traceback" not in other.stderr
