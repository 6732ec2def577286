"""Checks that take milliseconds stop a wrong run before it loads anything."""

import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from data.errors import UserError
from loop.config import preflight
from loop.config.flags import Config
from loop.distributed.accelerator import check_launch
from loop.doctor import forecast
from tests.doctor.test_doctor import (
    ZERO3,
    Doctor,
    deepspeed,
    doctor,
    installed,
    problems,
    right,
    write,
)
from tests.support.helpers import command, write_dialogues

__all__ = ["doctor", "right"]  # fixtures


def test_incompatible_versions_are_reported(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path / "a", "peft", "0.10.0"))
    monkeypatch.syspath_prepend(installed(tmp_path / "b", "tokenizers", "0.99.0"))
    old, odd = doctor()
    assert "found peft 0.10.0; expected >=0.18" in old
    assert "found tokenizers 0.99.0; transformers 5.23.0 expects" in odd


def test_packages_that_cannot_be_imported_are_reported_without_a_traceback(tmp_path: Path) -> None:
    old = str(installed(tmp_path, "tokenizers", "0.1.0"))
    done = command(
        *(sys.executable, "-m", "loop", "doctor", "--lora_r", "0"),
        *("--model_name_or_path", tmp_path),
        PYTHONPATH=old,
        LORA_LOOP_WARM="",
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    flag, conflict, cause = problems(done.stderr)
    assert "--lora_r: found 0" in flag
    assert "found tokenizers 0.1.0; transformers 5.23.0 expects" in conflict
    assert "cannot be imported, so no other check ran: tokenizers>=" in cause
    check = command(
        *("./launch.sh", "--model_name_or_path", tmp_path), PYTHONPATH=old, LORA_LOOP_WARM=""
    )
    assert check.returncode == 2
    assert "error: found tokenizers 0.1.0; transformers" in check.stderr


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ("--q_lora", "bitsandbytes"),
        ("--report_to wandb", "wandb"),
        ("--report_to trackio", "trackio"),
        ("--report_to tensorboard", "tensorboard"),
        ("--accelerate_config accelerate_configs/zero2.yaml", "deepspeed"),
    ],
)
def test_a_missing_package_that_a_flag_needs_is_reported(
    flags: str, package: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = preflight.version
    monkeypatch.setattr(preflight, "version", lambda name: None if name == package else known(name))
    (found,) = doctor(*flags.split())
    assert f"the package {package} is not installed. Install it: pip install {package}" in found
    assert doctor() == []


def test_free_disk_and_memory_are_compared_with_the_need(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**4))
    (found,) = doctor()
    assert "found 0.0 MB free; expected at least 0.1 MB" in found
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, 10**7))
    (found,) = doctor("--max_steps", "100", "--save_steps", "10")
    assert "found 10 MB free; expected 16 MB for 10 checkpoints of 1.1 MB" in found
    assert doctor("--max_steps", "100", "--save_steps", "10", "--save_total_limit", "2") == []
    monkeypatch.setattr(forecast, "memory_per_rank", lambda: 10**6)
    (found,) = doctor()
    assert "memory: found 0.0 GiB per rank in main memory" in found
    assert "--gradient_checkpointing True, or a smaller" in found


@pytest.mark.parametrize(
    ("config", "stage", "expected"),
    [
        (Config(torch_compile=True), 3, "--torch_compile: found ZeRO-3"),
        (Config(q_lora=True, bf16=True, lora_bias="all"), 0, "without an fp32 master"),
        (Config(lora_weight_path="x", lora_bias="all"), 3, "biases cannot be loaded"),
    ],
)
def test_flags_that_a_zero_stage_does_not_support_are_refused_only_there(
    config: Config, stage: int, expected: str
) -> None:
    (found,) = preflight.problems(config, stage)
    assert expected in found
    assert not [*preflight.problems(config, 2)]
    assert not [*preflight.problems(config)]  # Before the launch, the stage is unknown.


def test_training_reports_all_errors_in_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, "peft", "0.10.0"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError) as error:
        check_launch(Config(torch_compile=True, flash_attn=True, bf16=True))
    first, *lines = str(error.value).splitlines()
    assert first == "4 problems"
    found = ("peft 0.10.0", "package flash_attn is not", "--torch_compile", "found no GPU")
    assert [text in line for text, line in zip(found, lines, strict=True)] == [True] * 4


def test_two_ranks_report_an_error_once_before_data_is_read(tmp_path: Path) -> None:
    words = ("--torch_compile", "--data_path", write_dialogues(tmp_path / "d.json", ["Hi", "Yo"]))
    done = command(
        *("./launch.sh", "accelerate_configs/zero3.yaml", *words, "--output_dir", tmp_path / "run"),
        NUM_PROCESSES="2",
    )
    assert done.returncode == 2
    assert done.stderr.count("--torch_compile: found ZeRO-3") == 1
    assert "Traceback" not in done.stderr
    assert "data:" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_it_imports_nothing_large() -> None:
    code = "import sys; from loop.config import preflight; from loop.doctor import check; "
    code += "from loop.config.flags import Config; "
    code += "assert not [*preflight.problems(Config(), 0)]; "
    code += "print({'torch', 'transformers', 'datasets', 'matplotlib'} & {*sys.modules})"
    assert command(sys.executable, "-c", code).stdout == "set()\n"


def test_contradictions_of_a_deepspeed_json_are_reported_next_to_data_errors_and_a_bad_key(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {"gradient_clipping": 0.5, "train_micro_batch_size_per_gpu": 7, "nonsense": 1}
    file = deepspeed(tmp_path, **values)
    expected = ("nonsense: unknown key", "per_gpu 7, ", "clipping 0.5, ", "--torch_compile: found")
    flags = ("--torch_compile", "--deepspeed", file, *ZERO3)
    first = write(tmp_path / "a.json", "[1]")
    second = write(tmp_path / "b.json", "[1]")
    found = doctor(*flags, "--data_path", first, second)
    lines = (*expected, "a.json", "b.json")
    assert len(found) == len(lines)
    assert [text in line for text, line in zip(lines, found, strict=True)] == [True] * 6
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(UserError) as error:
        check_launch(Config(deepspeed=str(file), torch_compile=True))
    reported = problems(str(error.value))
    assert [text in line for text, line in zip(expected, reported, strict=True)] == [True] * 4


@pytest.mark.parametrize("text", ["{", '{"zero_optimization": {"stage": 3, "bad": 1}}'])
def test_the_launch_is_checked_even_if_the_deepspeed_json_is_invalid(
    text: str, doctor: Doctor, tmp_path: Path
) -> None:
    file = write(tmp_path / "ds.json", text)
    _, stage = doctor("--torch_compile", "--deepspeed", file, *ZERO3)
    assert "--torch_compile: found ZeRO-3" in stage


def test_a_prompt_that_looks_like_a_missing_file_is_refused_and_a_question_is_not() -> None:
    lost = ("/no/such", "none.txt", "none.jsonl")
    found = [*preflight.problems(Config(sample_prompts=lost))]
    assert len(found) == 3
    assert all("no such file; expected" in line for line in found)
    asked = ("Hi", "yes/no?", "And/or what?", "What is a.txt", "x" * 9999)
    assert not [*preflight.problems(Config(sample_prompts=asked))]
