"""README and docs match the code: the loop, the folders, the commands and the links."""

import importlib
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from loop.adapters.chat import ChatConfig
from loop.adapters.merge import MergeConfig
from loop.config.flags import Config
from loop.doctor.flags import DoctorConfig
from loop.doctor.show import ShowConfig
from tests.support.helpers import ROOT, command, launch, write_dialogues

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
CONFIGS = {"train": Config, "show": ShowConfig, "chat": ChatConfig, "merge": MergeConfig}
CONFIGS |= {"doctor": DoctorConfig}
OWN_FLAGS = {"--config", "--help"}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Return all commands in a page's bash blocks, with joined lines and without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.partition("  #")[0].split()) for line in lines if line.strip()]


def command_of(page: Path, start: str) -> str:
    """Return the only command of a page that starts with these words."""
    (found,) = (line for line in commands(page) if line.startswith(start))
    return found


def test_the_loop_in_readme_equals_the_code() -> None:
    code = (ROOT / "loop/train.py").read_text()
    (loop,) = blocks(README, "python")
    assert textwrap.indent(loop, "    ") in code
    assert loop.startswith("tracker = Tracker")
    assert loop.splitlines()[-1].startswith("    ")  # README has the complete `with` block.
    assert code.split(textwrap.indent(loop, "    "))[1].startswith("\n    save_run(")


@pytest.mark.parametrize(("page", "most"), [(README, 150), *((page, 250) for page in PAGES)])
def test_a_page_keeps_its_budget_of_lines(page: Path, most: int) -> None:
    assert len(page.read_text().splitlines()) <= most


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.name)
def test_every_link_and_every_named_test_exists(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert not [link for link in links if not (page.parent / link).exists()]
    assert not [
        name for name in re.findall(r"tests/[\w/]+\.py", text) if not (ROOT / name).exists()
    ]


def test_the_main_job_in_readme_ends_as_a_run_does() -> None:
    job, _, _ = blocks(README, "text")[0].partition("+ python -m loop chat")
    names = [line.partition(":")[0] for line in job.splitlines()[-5:]]
    assert names == ["result", "saved", "use", "resume", "cost"]


def test_the_folders_in_readme_are_those_of_the_repository() -> None:
    named = [line.split()[0] for line in blocks(README, "text")[-1].splitlines()]
    packages = [f"loop/{path.parent.name}" for path in ROOT.glob("loop/*/__init__.py")]
    others = ["data", "accelerate_configs", "tests"]
    assert sorted(named) == sorted(packages + others)
    assert all((ROOT / name).is_dir() for name in named)


def test_readme_names_every_accelerate_config_and_each_opens_with_its_command() -> None:
    for path in (ROOT / "accelerate_configs").iterdir():
        name = f"accelerate_configs/{path.name}"
        assert name in README.read_text()
        first, second = path.read_text().splitlines()[:2]
        assert first == f"# accelerate launch --config_file {name} loop/train.py"
        assert second.startswith("# ")
        # accelerate refuses a file without the number. The default is one rank per machine.
        machines = 2 if "multi_node" in name else 1
        assert f"num_processes: {machines}\n" in path.read_text()


def test_readme_holds_the_commands_that_are_tested() -> None:
    # tests/project/test_main_job.py runs ./launch.sh, and ./launch.sh test runs this file.
    first, second, real, chat, merge = commands(README)
    assert (first, second) == ("./launch.sh", "./launch.sh test")
    assert real.startswith("accelerate launch --config_file accelerate_configs/zero2.yaml")
    assert chat.startswith("python -m loop chat --adapter runs/main_job")
    assert merge.startswith("python -m loop merge --adapter runs/main_job")


@pytest.mark.parametrize(
    "line",
    [line for page in (README, *PAGES) for line in commands(page) if "convert_hf" not in line],
)
def test_every_documented_command_uses_files_and_flags_that_exist(line: str) -> None:
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]
    configs = [word for word in words if word.startswith("accelerate_configs/")]
    assert all((ROOT / config).is_file() for config in configs)
    if "-m data" in line:
        module = importlib.import_module(f"data.preparation.{words[3]}")
        known = {*module.flags()._option_string_actions}
    else:
        config = CONFIGS[words[3] if "-m loop" in line else "train"]
        known = {f"--{name}" for name in config.__dataclass_fields__} | OWN_FLAGS
        if words[0] == "accelerate":
            words = words[words.index("loop/train.py") :]
    assert not {word for word in words if word.startswith("--")} - known


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
    prepare = [line for line in commands(ROOT / "docs/data.md") if line.startswith("python -m d")]
    assert [line.split()[3] for line in prepare] == ["convert", "clean", "split", "stats"]
    outputs = []
    for line in prepare:
        line = line.replace("models/", f"{chat_model.parent}/")
        done = command("bash", "-c", f"cd {tmp_path} && PYTHONPATH={ROOT} {line}")
        assert done.returncode == 0, done.stderr
        outputs.append(done.stderr)
    # Without its last question, the second dialogue equals the first.
    accounts = ["read 3 = kept 3", "read 3 = kept 2 + dropped 1 (duplicate content: 1"]
    accounts += ["read 2 ="] * 2
    found = [account in text for account, text in zip(accounts, outputs, strict=True)]
    assert found == [True] * 4
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 2


def test_the_show_command_runs(chat_model: Path) -> None:
    data = "python -m loop show --data_path data/dummy_conversation.json"
    show = command_of(ROOT / "docs/data.md", f"{data} |")
    done = command("bash", "-c", f"set -o pipefail; {show}")
    assert done.returncode == 0, done.stderr
    assert "⟦" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "model"),
    [(README, "tiny_model"), (ROOT / "docs/flan-t5.md", "tiny_t5")],
    ids=["decoder", "Flan-T5"],
)
def test_the_documented_training_command_trains_a_small_model_without_a_gpu(
    page: Path, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The test changes only model, data, attention kernel, folder and number of ranks."""
    _, _, flags = command_of(page, "accelerate launch").partition("loop/train.py")
    texts = [["Hi", "Yo, I am happy to be here."], ["And?", "So, I am happy to be here."]]
    data = write_dialogues(tmp_path / "data.json", *texts)
    words = shlex.split(flags)
    values = dict(zip(words[::2], words[1::2], strict=True))
    values["--model_name_or_path"] = str(request.getfixturevalue(model))
    values |= {"--flash_attn": "False", "--data_path": str(data)}
    values["--output_dir"] = str(tmp_path / "run")
    flat = [word for pair in values.items() for word in pair]
    history = launch("zero2", tmp_path / "run", *flat, processes=2)
    assert history[-1]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("config", ["single_gpu", "zero3_offload"])
def test_the_other_configs_train_too(config: str, tiny_model: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo"])
    flags = ("--model_name_or_path", tiny_model, "--data_path", data, "--max_steps", "2")
    assert launch(config, tmp_path / "run", *flags)[-1]["step"] == 2
