"""The dtypes of trained and frozen parameters."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from data.errors import UserError
from loop import train as training
from loop.distributed import precision
from loop.distributed.precision import bf16_speedup
from tests.support.helpers import log_of

Train = Callable[..., Path]


@pytest.fixture
def dtypes(monkeypatch: pytest.MonkeyPatch) -> dict[bool, set[torch.dtype]]:
    """Collect the dtypes of trainable (True) and frozen (False) parameters of loaded models."""
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    describe = training.describe_parameters

    def look(model: torch.nn.Module) -> str:
        for parameter in model.parameters():
            found[parameter.requires_grad].add(parameter.dtype)
        return describe(model)

    monkeypatch.setattr(training, "describe_parameters", look)
    return found


def test_fp16_without_a_gpu_is_refused_with_the_reason(train: Train) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="loss scaling"):
        train("run", "--fp16")
    with pytest.raises(UserError, match="no GPU, which FlashAttention-2 needs"):
        train("run", "--flash_attn", "--bf16")


def test_qlora_upcasts_no_frozen_parameter_and_prints_the_bytes(
    train: Train, capsys: pytest.CaptureFixture[str], dtypes: dict[bool, set[torch.dtype]]
) -> None:
    train("run", "--bf16", "--q_lora", "True")
    # Norms, embeddings, LM head and the tensors of the 4-bit codes are bf16.
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model:")]
    sizes = dict(re.findall(r"(4-bit scales|4-bit|\w+) ([\d.]+) MiB", line))
    assert {*sizes} == {"bfloat16", "4-bit", "4-bit scales", "float32"}


def test_bf16_training_keeps_trainable_parameters_in_fp32(
    train: Train, dtypes: dict[bool, set[torch.dtype]]
) -> None:
    folder = train("run", "--bf16")
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    exact = log_of(train("exact"))
    for mine, theirs in zip(log_of(folder), exact, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-2)


def test_auto_takes_bf16_only_where_its_products_are_measured_to_be_faster(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda: True)
    for name, ratio, expected in (("fast", 2.14, "bf16"), ("slow", 1.2, "no")):
        monkeypatch.setattr(precision, "bf16_speedup", lambda ratio=ratio: ratio)
        folder = train(name, "--mixed_precision", "auto")
        settings = yaml.safe_load((folder / "training_config.yaml").read_text())
        assert settings["mixed_precision"] == expected
        shown = expected.replace("no", "fp32")
        assert (
            f"precision: {shown}, as bf16 matrix products are {ratio:.1f} x as fast here as fp32's"
            in capsys.readouterr().out
        )


def test_auto_keeps_the_precision_of_the_run_in_its_folder(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda: True)
    monkeypatch.setattr(precision, "bf16_speedup", lambda: 2.0)
    train("run", "--mixed_precision", "auto")
    monkeypatch.setattr(precision, "bf16_speedup", lambda: 0.5)
    capsys.readouterr()
    folder = train("run", "--mixed_precision", "auto")
    out = capsys.readouterr().out
    assert "precision: bf16, as recorded in the output folder" in out
    assert "after step 4 of 4" in out  # With another precision, the resume would be refused.
    assert "mixed_precision: bf16" in (folder / "training_config.yaml").read_text()


def test_the_speedup_is_measured_in_half_a_second_and_leaves_the_threads() -> None:
    threads = torch.get_num_threads()
    bf16_speedup()  # The first products compile their kernels.
    started = time.process_time()
    ratio = bf16_speedup()
    assert time.process_time() - started < 0.5
    assert 0 < ratio < 100
    assert torch.get_num_threads() == threads
