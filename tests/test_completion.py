"""A real bash completes commands, flags and values, from one script that costs nothing to ask."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.__main__ import COMMANDS
from data.errors import UserError
from loop import completion
from loop.config import Config
from tests.helpers import ROOT

# What bash does at TAB: it sets these, calls the command's function, and takes COMPREPLY.
ASK = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
specification=$(complete -p "$1" 2>/dev/null || complete -p "${1##*/}")
compopt() { :; }  # there is no completion going on that it could change
function=$(sed 's/.*-F \\([^ ]*\\) .*/\\1/' <<<"$specification")
"$function" "$1" "${@: -1}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the command prints for each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    for shell in completion.SHELLS:
        with pytest.MonkeyPatch.context() as patch, open(folder / shell, "w") as file:
            patch.setattr(sys, "stdout", file)
            completion.main([shell])
    return folder


def asked(script: Path, *words: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", ASK, "bash", script, *words],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert not done.stderr
    return sorted(done.stdout.split())


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("./launch.sh --max_s", ["--max_steps"]),
        ("./launch.sh accelerate_configs/ddp.yaml --lora_r 4 --lora_b", ["--lora_bias"]),
        ("./launch.sh --output_dir runs/x --until", ["--until-done"]),
        ("./launch.sh --data_path a.json b.json --eval_f", ["--eval_fraction"]),
        ("./launch.sh --mixed_precision ", ["bf16", "fp16", "no"]),
        ("./launch.sh --report_to wandb t", ["tensorboard", "trackio"]),
        ("./launch.sh --q_lora T", ["True"]),
        ("./launch.sh --q_lora --tags", ["--tags"]),
        ("./launch.sh set", ["setup"]),
        ("./launch.sh accelerate_configs/sing", ["accelerate_configs/single_gpu.yaml"]),
        ("python -m loop cha", ["chat"]),
        ("python -m loop chat --comp", ["--compare"]),
        ("python3 -m loop merge --dtype ", ["auto", "bf16", "fp32"]),
        ("python -m loop show --num_data 3 --js", ["--jsonl"]),
        ("python -m loop completion ", ["bash", "zsh"]),
        ("python -m data sp", ["split"]),
        ("python -m data clean --in a.json --pers", ["--personal"]),
        ("python -m data split --long_round ", ["drop", "truncate"]),
        ("python -m da", ["data"]),
        ("python --vers", []),  # not ours: bash goes on to its own completion, files
    ],
)
def test_bash_completes(line: str, found: list[str], scripts: Path) -> None:
    assert asked(scripts / "bash", *line.split(" ")) == found


def test_a_completion_of_python_that_was_there_is_kept(scripts: Path, tmp_path: Path) -> None:
    before = "_mine() { COMPREPLY=(mine); }; complete -F _mine python\n"
    both = tmp_path / "both"
    # Twice, as where .bashrc is read again.
    both.write_text(before + 2 * f"source {scripts / 'bash'}\n")
    assert asked(both, "python", "x") == ["mine"]
    assert asked(both, "python", "-m", "loop", "mer") == ["merge"]


def test_every_command_and_flag_of_training_is_completed(scripts: Path) -> None:
    flags = {f"--{name}" for name in Config.__dataclass_fields__}
    assert flags <= {*asked(scripts / "bash", "./launch.sh", "--")}
    # Not imported, since it runs what it is given.
    commands = re.findall(r'^    "(\w+)": ', (ROOT / "loop/__main__.py").read_text(), re.MULTILINE)
    assert asked(scripts / "bash", "python", "-m", "loop", "") == sorted(commands)
    assert asked(scripts / "bash", "python", "-m", "data", "") == sorted(COMMANDS)


def test_zsh_has_the_same_flags_with_their_meaning(scripts: Path) -> None:
    text = (scripts / "zsh").read_text()
    assert r'"--model_max_length[tokens\; longer dialogues' in text
    assert ":no|bf16|fp16:(no bf16 fp16)" in text
    assert "FOLDER:_files -/" in text
    assert "compdef _shtab_launch_sh launch.sh" in text


def test_another_shell_is_refused() -> None:
    with pytest.raises(UserError, match="found fish; expected a shell: bash or zsh"):
        completion.main(["fish"])


def test_the_commands_do_not_load_what_only_completion_needs() -> None:
    code = "import sys, loop.settings, data.jobs; assert 'shtab' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
