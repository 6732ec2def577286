"""README tells the truth: its loop is the code's, its tree is the tree, its commands run."""

import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from tests.support.helpers import ROOT, command, launch, write_dialogues

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """Return each command of README's bash blocks, continued lines joined, comments cut."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines if line.strip()]


def test_the_loop_in_readme_is_the_loop() -> None:
    code = (ROOT / "loop/train.py").read_text()
    (loop,) = blocks("python")
    assert "MAIN_JOB" not in README
    assert textwrap.indent(loop, "    ") in code
    assert loop.startswith("tracker = Tracker")
    assert "tracker.observe(" in loop


def test_the_main_job_in_readme_ends_as_a_run_does() -> None:
    job, _, _ = blocks("text")[0].partition("+ python -m loop chat")
    names = [line.partition(":")[0] for line in job.splitlines()[-5:]]
    assert names == ["result", "saved", "use", "resume", "cost"]
    assert "built successfully" not in job  # loop/distributed/rank_zero.py


def test_the_tree_in_readme_is_the_tree() -> None:
    tree = blocks("text")[-1]
    named = set(re.findall(r"^\S+/[\w.]+|^\S+\.\w+", tree, re.MULTILINE))
    folders = ("loop", "data", "docs", "tests", "benchmarks", "accelerate_configs")
    found = {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).iterdir()
        if path.is_file() and path.name != "__init__.py"
    }
    top = {"launch.sh", "requirements.txt", "requirements-dev.txt", "pyproject.toml"}
    assert named == found | top | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}


def test_readme_names_every_accelerate_config_and_each_opens_with_its_command() -> None:
    for path in (ROOT / "accelerate_configs").iterdir():
        name = f"accelerate_configs/{path.name}"
        assert name in README
        first, second = path.read_text().splitlines()[:2]
        assert first == f"# accelerate launch --config_file {name} loop/train.py"
        assert second.startswith("# ")
        # One rank a machine unless told: accelerate refuses a file without the number.
        machines = 2 if "multi_node" in name else 1
        assert f"num_processes: {machines}\n" in path.read_text()


def test_readme_holds_the_commands_that_are_tested() -> None:
    # launch.sh itself is run by test_main_job.py; `test` is what runs this.
    first, second, show, real, *prepare, t5, chat, merge = commands()
    assert [line.split()[:4][-1] for line in prepare] == ["convert", "clean", "split", "stats"]
    assert (first, second) == ("./launch.sh", "./launch.sh test")
    assert show.startswith("python -m loop show")
    assert real.startswith("accelerate launch --config_file accelerate_configs/zero2.yaml")
    assert "--model_name_or_path google/flan-t5-xl" in t5
    assert chat.startswith("python -m loop chat --adapter runs/main_job")
    assert merge.startswith("python -m loop merge --adapter runs/main_job")


def test_the_commands_that_prepare_data_run_one_after_the_other(
    chat_model: Path, tmp_path: Path
) -> None:
    texts = [
        ("user", "What is the tallest mountain?"),
        ("assistant", "It is Mount Everest."),
    ]
    turns = [{"role": role, "content": text} for role, text in texts]
    lines = [json.dumps({"id": str(n), "messages": [*turns, *turns[: n % 3]]}) for n in range(3)]
    (tmp_path / "export.jsonl").write_text("\n".join(lines))
    said = []
    for line in (line for line in commands() if line.startswith("python -m data")):
        line = line.replace("models/", f"{chat_model.parent}/")
        done = command("bash", "-c", f"cd {tmp_path} && PYTHONPATH={ROOT} {line}")
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    # Without its last question the second dialogue is the first.
    accounts = ["read 3 = kept 3", "read 3 = kept 2 + dropped 1 (duplicate content: 1"]
    accounts += ["read 2 ="] * 2
    assert [account in text for account, text in zip(accounts, said, strict=True)] == [True] * 4
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 2


def test_the_show_command_runs(chat_model: Path) -> None:
    show = next(line for line in commands() if "loop show" in line)
    done = command("bash", "-c", f"set -o pipefail; {show}")
    assert done.returncode == 0, done.stderr
    assert "⟦" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "Flan-T5"])
def test_the_real_command_trains_a_small_model_without_a_gpu(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Everything but the model, the data, the GPU's attention and their number is as it stands."""
    decoder, t5 = (line for line in commands() if "accelerate launch" in line)
    _, _, flags = (decoder if kind == "decoder" else t5).partition("loop/train.py")
    tiny_model = request.getfixturevalue("tiny_model" if kind == "decoder" else "tiny_t5")
    texts = [["Hi", "Yo, I am happy to be here."], ["And?", "So, I am happy to be here."]]
    data = write_dialogues(tmp_path / "data.json", *texts)
    words = shlex.split(flags)
    values = dict(zip(words[::2], words[1::2], strict=True))
    values |= {"--model_name_or_path": str(tiny_model), "--data_path": str(data)}
    values |= {"--flash_attn": "False", "--output_dir": str(tmp_path / "run")}
    flat = [word for pair in values.items() for word in pair]
    history = launch("zero2", tmp_path / "run", *flat, processes=2)
    assert history[-1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("config", ["single_gpu", "zero3_offload"])
def test_the_other_configs_train_too(config: str, tiny_model: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo"])
    flags = ("--model_name_or_path", tiny_model, "--data_path", data, "--max_steps", "2")
    assert launch(config, tmp_path / "run", *flags)[-1]["step"] == 2
