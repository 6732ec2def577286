"""Under ZeRO-3, all ranks try the same micro-batches, because a pass contains collectives."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from loop.training import auto_micro_batch
from tests.support.helpers import adapter_of, command, log_of, write_dialogues
from tests.support.matrix import share_all_file

TEXTS = [["What is " + "very " * (n % 7) + "long?", "No " + "idea. " * n] for n in range(40)]
FLAGS = "--max_steps 4 --logging_steps 1 --learning_rate 1e-2 --lora_dropout 0.1 --save_steps 2"
EACH = 16  # examples per rank and step
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def usual(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """The flags of every run here: all weights partitioned, dropout on."""
    folder = tmp_path_factory.mktemp("data")
    data = write_dialogues(folder / "data.json", *TEXTS)
    flags = ["--model_name_or_path", tiny_model, "--data_path", data, *FLAGS.split()]
    flags += ["--global_batch_size", str(2 * EACH), "--mixed_precision", "no"]
    return [*flags, "--deepspeed", share_all_file(folder)]


def run(output: Path, *flags: str | Path, room: str, config: str = "zero3", **env: str) -> Done:
    return command(
        *("accelerate", "launch", "--config_file", f"accelerate_configs/{config}.yaml"),
        *("--num_processes", "2", "--main_process_port", "0", "tests/support/fitted_train.py"),
        *("--output_dir", output, *flags),
        ROOM=room,
        **env,
    )


def kept(output: Path, step: int = 4) -> Any:
    """Return a checkpoint's record of the search."""
    file = output / f"checkpoint-{step}" / "progress.json"
    return json.loads(file.read_text())["auto_micro_batch"]


def tried(done: Done) -> list[list[int]]:
    """Return for each rank the tokens of the passes that it tried."""
    lines = re.findall(r"tried on rank (\d): \[(.*)\]", done.stdout)
    return [[int(word) for word in words.split(", ") if word] for _, words in sorted(lines)]


@pytest.fixture(scope="module")
def found(usual: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A finished run with less memory on rank 1 than on rank 0."""
    output = tmp_path_factory.mktemp("found") / "run"
    done = run(output, *usual, "--auto_micro_batch", room="100000 700")
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_all_ranks_try_the_same_and_the_smallest_room_decides(
    found: tuple[Path, Done],
) -> None:
    output, done = found
    first, second = tried(done)
    assert first == second
    assert len({*first}) > 2
    assert max(first) <= 700
    assert 700 - auto_micro_batch.TOKEN_MULTIPLE <= kept(output)["tokens"] <= 700


def test_losses_and_adapter_equal_a_run_with_the_same_limit_as_a_flag(
    found: tuple[Path, Done], usual: list[str | Path], tmp_path: Path
) -> None:
    output, _ = found
    limits = ("--tokens_per_micro_batch", str(kept(output)["tokens"]))
    limits += ("--per_device_train_batch_size", str(EACH))
    done = run(tmp_path / "run", *usual, *limits, room="1 1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert tried(done) == [[], []]
    plain, auto = log_of(tmp_path / "run"), log_of(output)
    assert [e["loss"] for e in plain] == [e["loss"] for e in auto]
    assert [e["grad_norm"] for e in plain] == [e["grad_norm"] for e in auto]
    by_flags, by_itself = adapter_of(tmp_path / "run"), adapter_of(output)
    assert by_flags.keys() == by_itself.keys()
    assert all(torch.equal(tensor, by_itself[name]) for name, tensor in by_flags.items())


def test_a_resumed_run_tries_nothing_and_equals_the_uninterrupted_run(
    found: tuple[Path, Done], usual: list[str | Path], tmp_path: Path
) -> None:
    output, _ = found
    start = ("--resume_from_checkpoint", output / "checkpoint-2")
    done = run(tmp_path / "run", *usual, "--auto_micro_batch", *start, room="100000 100000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert tried(done) == [[], []]
    assert kept(tmp_path / "run") == kept(output)
    resumed, whole = adapter_of(tmp_path / "run"), adapter_of(output)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_too_little_memory_on_one_rank_is_one_message_and_exit_code_2_on_all(
    usual: list[str | Path], tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.touch()
    done = run(
        *(tmp_path / "run", *usual, "--auto_micro_batch"),
        room="100000 1",
        LORA_LOOP_STATUS_FILE=str(status),
    )
    # Rank 0 writes the exit code to the status file; then all ranks exit with 0 (signals.py).
    assert done.returncode == 0, done.stdout + done.stderr
    assert status.read_text().startswith("2 --auto_micro_batch: the longest example alone does")
    assert done.stderr.count("the longest example alone does not fit in memory") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_out_of_memory_in_a_pass_is_an_error_and_leaves_no_rank_waiting(
    rank: int, usual: list[str | Path], tmp_path: Path
) -> None:
    rooms = ["100000", "100000"]
    rooms[rank] = "-100"
    done = run(tmp_path / "run", *usual, "--auto_micro_batch", room=" ".join(rooms))
    assert done.returncode != 0
    assert "--auto_micro_batch: found too little memory for a micro-batch of" in done.stderr
    assert "Give --tokens_per_micro_batch" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("zero3", ("--gradient_checkpointing", "True")),
        ("zero3", ("--q_lora", "True")),
        ("zero3", ("--q_lora", "True", "--gradient_checkpointing", "True")),
        ("zero3_offload", ()),
        ("zero3_offload", ("--q_lora", "True", "--gradient_checkpointing", "True")),
    ],
)
def test_the_result_is_the_same_with_checkpointing_4_bit_weights_and_offload(
    config: str, more: tuple[str, ...], usual: list[str | Path], tmp_path: Path
) -> None:
    *flags, _, _ = usual  # without DeepSpeed's file, which offloads nothing
    flags += [*more, "--per_device_train_batch_size", str(EACH)]
    outputs = {}
    for name, room in {"auto": "100000 700", "flags": "1 1"}.items():
        limit = ["--auto_micro_batch"]
        if name == "flags":
            limit = ["--tokens_per_micro_batch", str(kept(outputs["auto"])["tokens"])]
        outputs[name] = tmp_path / name
        done = run(tmp_path / name, *flags, *limit, room=room, config=config)
        assert done.returncode == 0, done.stdout + done.stderr
        assert bool(tried(done)[0]) == (name == "auto")
    logs = [[entry["loss"] for entry in log_of(output)] for output in outputs.values()]
    assert logs[0] == logs[1]
    auto, by_flags = map(adapter_of, outputs.values())
    assert all(torch.equal(tensor, by_flags[name]) for name, tensor in auto.items())
