"""launch.sh and the commands end with the documented exit code and one message."""

import contextlib
import itertools
import json
import shlex
import shutil
import socket
from pathlib import Path

import pytest

from data.errors import RunError, UserError
from loop.distributed.accelerator import raise_on_all_ranks
from tests.support.helpers import ROOT, command, write_dialogues

MODEL = "--model_name_or_path"


@pytest.fixture(scope="module", autouse=True)
def _environment() -> None:
    if not (ROOT / ".venv").is_dir():
        pytest.skip("needs the .venv of ./launch.sh test")
    command("./launch.sh", "--help")  # The first command waits until the warm process is ready.


def one_message(text: str) -> str:
    """Return the only error of an output; a second error or a traceback fails."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, text
    assert "Traceback" not in text
    return errors[0]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--lora_rank", "8"], "Did you mean --lora_r?"),
        (["--lora_r", "0"], "--lora_r: found 0"),
        ([MODEL, "./missing"], "./missing: no such folder"),
        ([MODEL, "someone/missing"], "someone/missing: no such folder, not in the cache"),
        (["--data_path", "missing.json"], "missing.json: no such file"),
        ([MODEL, "my--model"], "my--model cannot be loaded: HFValidationError"),
        (["--data_path", "accelerate_configs"], "accelerate_configs: a folder without data"),
        (["missing.yaml"], "missing.yaml: no such file"),
        (["loop/config/main_job.yaml"], "Give settings of a run with --config"),
    ],
)
def test_a_wrong_flag_or_path_is_named_without_retries_of_the_hub(
    words: list[str], found: str
) -> None:
    asks = "someone/missing" in words
    # A hub that accepts connections, but never answers.
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hub:
        address = f"http://127.0.0.1:{hub.getsockname()[1]}"
        # A cold start if the hub is used, because the warm process has already read its address.
        cold = {"LORA_LOOP_WARM": ""} if asks else {}
        done = command("./launch.sh", *words, HF_HUB_OFFLINE="0", HF_ENDPOINT=address, **cold)
        calls = calls_of(hub)
    assert done.returncode == 2
    assert found in one_message(done.stderr)
    # Without the project's check, transformers would try five times, and wait in between.
    assert calls in ((1, 2) if asks else (0,))


def calls_of(server: socket.socket) -> int:
    """Return the number of connections that wait for accept."""
    server.setblocking(False)
    with contextlib.ExitStack() as taken:
        for calls in itertools.count():
            try:
                taken.enter_context(server.accept()[0])
            except BlockingIOError:
                return calls
    raise AssertionError


def test_wrong_data_is_one_message_from_two_ranks(tiny_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    good = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}
    bad = {"id": "x", "conversations": [{"from": "Zed", "value": "Hi"}]}
    # The check before the launch reads fewer records, so the ranks find this one.
    data.write_text(json.dumps([good] * 25 + [bad]))
    done = command(
        "./launch.sh", MODEL, tiny_model, "--data_path", data, "--output_dir", tmp_path / "run",
        NUM_PROCESSES="2",
    )  # fmt: skip
    assert done.returncode == 2
    assert f'{data}: record 25 (id "x"): turn 0 has the role "Zed"' in one_message(done.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_plain_launch_of_two_ranks_reports_an_error_once(tmp_path: Path) -> None:
    done = command(
        "accelerate", "launch", "--config_file", "accelerate_configs/zero2.yaml",
        "--num_processes", "2", "--main_process_port", "0", "loop/train.py", "--lora_rank", "8",
    )  # fmt: skip
    assert done.returncode == 1  # The launcher does not pass on the ranks' exit codes.
    assert done.stderr.count("--lora_rank: unknown flag. Did you mean --lora_r?") == 1


def test_a_failure_without_a_user_error_exits_with_1(broken_model: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo"])
    done = command(
        "./launch.sh", "accelerate_configs/cpu.yaml", MODEL, broken_model, "--data_path", data,
        "--output_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: step 3: 3 steps in a row" in done.stderr


def test_help_lists_every_flag_and_trains_nothing() -> None:
    done = command("./launch.sh", "--lora_r", "4", "--help")
    assert done.returncode == 0
    assert "--lora_target_modules" in done.stdout
    assert "--until-done" in done.stdout  # A flag of launch.sh itself.
    assert "./launch.sh setup" in command("./launch.sh", "-h").stdout


def test_a_missing_requirement_is_reported_with_its_package(tmp_path: Path) -> None:
    script = (ROOT / "launch.sh").read_text()
    (tmp_path / "launch.sh").write_text(script)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "grep", "cat"):
        (tools / name).symlink_to(
            next(p for p in (Path("/usr/bin"), Path("/bin")) if (p / name).exists()) / name
        )
    done = command("bash", tmp_path / "launch.sh", PATH=str(tools), PYTHON="python3")
    assert done.returncode == 2
    assert "apt-get install python3 python3-venv" in one_message(done.stderr)
    old = tools / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    done = command("bash", tmp_path / "launch.sh", PATH=str(tools))
    assert "Python 3.9.2 is too old" in one_message(done.stderr)
    old.write_text("#!/bin/sh\nexit 0\n")
    done = command("bash", tmp_path / "launch.sh", PATH=str(tools))
    assert "apt-get install g++" in one_message(done.stderr)


@pytest.fixture
def dry(tmp_path: Path) -> Path:
    """A copy of launch.sh with stub tools that print their arguments; no host *.invalid exists."""
    for name in ("requirements.txt", "accelerate_configs", "launch.sh"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    shutil.copy(ROOT / "requirements.txt", tmp_path / ".venv" / ".installed-requirements.txt")
    scripts = {
        "pip": "exit 0",
        "python": "exit 0",
        "accelerate": 'echo "STARTED $*"; echo 0 > "$LORA_LOOP_STATUS_FILE"',
        "scontrol": '[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"',
    }
    scripts |= {"getent": 'case "$*" in *.invalid) exit 2 ;; esac', "sleep": "exit 0"}
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    return tmp_path


ZERO2 = "accelerate_configs/zero2.yaml"
SLURM = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "123456",
    "NUM_PROCESSES": "8",
}


def test_the_variables_of_slurm_give_the_rendezvous(dry: Path) -> None:
    done = command("./launch.sh", ZERO2, "--lora_r", "4", cwd=dry, **SLURM)
    assert done.returncode == 0, done.stderr
    started = next(line for line in done.stdout.splitlines() if line.startswith("STARTED"))
    for words in (
        *("--num_processes 16", "--num_machines 2", "--machine_rank 1", "--same_network"),
        *("--main_process_ip node07", "--main_process_port 23456", "--rdzv_backend static"),
        *("--deepspeed_multinode_launcher standard", "loop/train.py --lora_r 4"),
    ):
        assert words in started
    two = command("./launch.sh", ZERO2, cwd=dry, **{**SLURM, "SLURM_STEP_NUM_TASKS": "16"})
    assert two.returncode == 2
    assert "found 16 SLURM tasks on 2 nodes" in one_message(two.stderr)


def test_explicit_machines_override_slurm_and_invalid_ones_are_named(dry: Path) -> None:
    mine = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    done = command("./launch.sh", ZERO2, "--lora_r", "4", cwd=dry, **SLURM | mine)
    started = next(line for line in done.stdout.splitlines() if line.startswith("STARTED"))
    for words in (
        *("--num_processes 24", "--machine_rank 2", "--main_process_ip 10.0.0.1"),
        "--main_process_port 1234",
    ):
        assert words in started
    assert "waiting for 3 machines at 10.0.0.1:1234" in done.stdout
    for words, found in (
        ({"NNODES": "2", "NODE_RANK": "0"}, "found NNODES=2 without MASTER_ADDR"),
        ({"NNODES": "2", "MASTER_ADDR": "10.0.0.1"}, "found NNODES=2 without NODE_RANK"),
        (
            {**mine, "MASTER_ADDR": "nowhere.invalid"},
            "MASTER_ADDR: found nowhere.invalid, an unknown host",
        ),
        ({**mine, "NNODES": "9" * 20}, "expected a whole number of six digits at most"),
        ({**mine, "NODE_RANK": "3"}, "NODE_RANK: found 3; expected 0 to 2"),
        ({**mine, "MASTER_PORT": "x"}, "MASTER_PORT: found x"),
        ({**mine, "MASTER_PORT": "99999"}, "MASTER_PORT: found 99999"),
        ({**mine, "NUM_PROCESSES": "08"}, "NUM_PROCESSES: found 08"),
    ):
        done = command("./launch.sh", ZERO2, cwd=dry, **words)
        assert done.returncode == 2
        assert found in one_message(done.stderr)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["accelerate_configs/multi_node_zero3.yaml"], "is for several machines, and NNODES"),
        (["accelerate_configs/cpu.yaml", "--max_restarts", "2"], "starts one process without"),
        ([ZERO2, "--max_restarts", "often"], '--max_restarts: found "often"'),
    ],
)
def test_a_launch_that_cannot_work_is_refused(words: list[str], found: str, dry: Path) -> None:
    done = command("./launch.sh", *words, cwd=dry)
    assert done.returncode == 2
    assert found in one_message(done.stderr)


def test_max_restarts_is_passed_to_torchelastic_only_on_one_machine(dry: Path) -> None:
    words = ("./launch.sh", ZERO2, "--max_restarts", "5", "--lora_r", "4")
    assert "--max_restarts 5 loop/train.py --lora_r 4" in command(*words, cwd=dry).stdout
    two = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "10.0.0.1"}
    assert "--max_restarts: found 2 machines" in one_message(command(*words, cwd=dry, **two).stderr)
    words = ("./launch.sh", "accelerate_configs/single_gpu.yaml")
    assert "starts one process on one machine" in one_message(
        command(*words, cwd=dry, **two).stderr
    )


MARKED = """import pytest

def test_plain(): pass
@pytest.mark.skip(reason="no reason")
def test_skipped(): pass
"""
WORKERS = "-n 4 --dist worksteal"


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("", f'-m "not slow" {WORKERS}'),
        ("--all -x", f"{WORKERS} -x"),
        ("-n 2 -k a", '-m "not slow" -n 2 -k a'),
        ("--all -m gpu", f"{WORKERS} -m gpu"),
    ],
)
def test_the_test_command_leaves_slow_tests_to_all(words: str, call: str, dry: Path) -> None:
    for name in ("ruff", "mypy"):
        (dry / ".venv/bin" / name).symlink_to("/bin/true")
    (dry / ".venv/bin/python").write_text('#!/bin/sh\nfor w; do printf "<%s>" "$w"; done; echo\n')
    shutil.copy(ROOT / "requirements-dev.txt", dry)
    done = command("./launch.sh", "test", *words.split(), cwd=dry)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("<-m><pytest>")]
    assert lines == ["".join(f"<{word}>" for word in shlex.split(f"-m pytest {call}"))]


def test_a_run_of_the_tests_ends_with_its_skips_by_reason(tmp_path: Path) -> None:
    (tmp_path / "test_marked.py").write_text(MARKED)
    words = ("python", "-m", "pytest", tmp_path, "-p", "tests.conftest", "-n", "2")
    words += ("--rootdir", ROOT, "-c", ROOT / "pyproject.toml")
    done = command(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2] == "skipped: 1 (no reason)"


def test_show_prints_what_the_loop_trains_on(tiny_model: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi 😊", "Hello there."], ["A", "B", "C", "D"])
    show = ["python", "-m", "loop", "show", "--data_path", data, MODEL, tiny_model]
    done = command(*show)
    assert done.returncode == 0, done.stderr
    assert "⟦Hello there.<|im_end|>⟧" in done.stdout
    assert "Hi 😊" in done.stdout
    assert "⟦Hi" not in done.stdout
    assert "read 2 = kept 2 + dropped 0" in done.stderr
    assert "\033[32mHello there.<|im_end|>\033[0m" in command(*show, FORCE_COLOR="1").stdout
    rows = [json.loads(line) for line in command(*show, "--jsonl").stdout.splitlines()]
    assert [row["id"] for row in rows] == ["d0", "d1"]
    for row in rows:
        pairs = [*zip(row["input_ids"], row["labels"], strict=True)]
        assert all(label in (-100, token) for token, label in pairs)
        assert any(label == token for token, label in pairs)


def test_an_unknown_command_names_the_nearest() -> None:
    done = command("python", "-m", "loop", "chatt")
    assert done.returncode == 2
    assert "Did you mean chat?" in one_message(done.stderr)
    done = command("python", "-m", "loop", "chat", "--adapter", "missing")
    assert done.returncode == 2
    assert "found no adapter_config.json" in one_message(done.stderr)


@pytest.mark.parametrize("kind", [UserError, RunError])
def test_an_error_raised_on_all_ranks_keeps_its_exit_code(kind: type[UserError]) -> None:
    with pytest.raises(UserError, match="the disk is full") as raised, raise_on_all_ranks():
        raise kind("the disk is full")
    assert raised.value.exit_code == kind.exit_code
    assert raised.value.known_to_all
