"""The dtypes of trained and frozen parameters."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.errors import UserError
from loop import train as training
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
