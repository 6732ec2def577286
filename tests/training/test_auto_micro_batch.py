"""The largest micro-batch that fits is found before the first step."""

import functools
import gc
import mmap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.batching.collate import Collator
from data.encoding.encode import Example
from data.errors import UserError
from loop.model.packed_attention import implementation, row_inputs
from loop.monitor.logger import Tracker
from loop.training import auto_micro_batch
from tests.support.helpers import adapter_of, allocated, launch, log_of, write_dialogues

Train = Callable[..., Path]
PER_TOKEN = 1000  # bytes
SLOW_CONFIGS = [pytest.param(c, marks=pytest.mark.slow) for c in ("zero1", "zero2_offload")]


def alone() -> Any:
    """Return the accelerator of a single rank without DeepSpeed."""
    state = SimpleNamespace(deepspeed_plugin=None)
    return SimpleNamespace(device=torch.device("cpu"), num_processes=1, state=state)


class Measured:
    """Replaces the pass by a simulated pass, whose peak memory is proportional to its tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.tokens: list[int] = []
        monkeypatch.setattr(auto_micro_batch, "memory_room", lambda _: room)
        monkeypatch.setattr(auto_micro_batch, "memory_used", lambda _: 10_000)
        monkeypatch.setattr(auto_micro_batch, "_peak_of", self.peak)

    def peak(self, _model: Any, batch: Any, *_: Any) -> int:
        self.tokens.append(batch.tokens)
        return 10_000 + PER_TOKEN * batch.tokens


def most(lengths: list[int]) -> int:
    # The last token of each example is only a target.
    examples = [Example(str(n), [1] * (n + 1), [1] * (n + 1), n) for n in sorted(lengths)[::-1]]
    prepared: Any = SimpleNamespace(
        examples=SimpleNamespace(longest=lambda count: examples[:count]),
        collator=Collator(0, None, lambda groups: {"groups": groups}),
    )
    return auto_micro_batch.max_tokens(None, prepared, 1024, alone(), len(lengths))


def test_the_result_fits_and_no_trial_exceeds_the_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = 10_000 + PER_TOKEN * 1500
    measured = Measured(monkeypatch, room)
    found = most([100] * 64)
    assert 1500 - auto_micro_batch.TOKEN_MULTIPLE <= found <= 1500
    assert measured.tokens == [100, 200, 400, 800]  # 1,600 do not fit and are not tried


def test_the_longest_examples_are_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch, 10**12)
    most([5, 300, 40, 200])
    assert measured.tokens == [300, 500, 545]


def test_nothing_fits_where_the_longest_example_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Measured(monkeypatch, 10_000 + PER_TOKEN * 299)
    assert most([300, 2, 2]) == 0


def test_what_is_found_keeps_a_real_pass_within_the_room(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is that of the pass' tensors; the memory of a process depends on the machine."""
    row = functools.partial(row_inputs, flash=False)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=implementation(True, False)
    )
    examples = [Example(str(n), [n] * 200, [n] * 200, 199) for n in range(100, 612)]
    prepared: Any = SimpleNamespace(
        examples=SimpleNamespace(longest=lambda count: examples[:count]),
        collator=Collator(0, None, row),
    )
    accelerator = alone()
    room = 300 * 2**20

    def peak_of(*arguments: Any) -> int:
        with allocated() as held:
            auto_micro_batch._forward_backward(*arguments)
        return held.most

    monkeypatch.setattr(auto_micro_batch, "memory_room", lambda _: room)
    monkeypatch.setattr(auto_micro_batch, "memory_used", lambda _: 0)
    monkeypatch.setattr(auto_micro_batch, "_peak_of", peak_of)
    tokens = auto_micro_batch.max_tokens(model, prepared, 1024, accelerator, len(examples))
    assert 200 <= tokens < 200 * 512

    def peak(tokens: int) -> int:
        batch = prepared.collator(examples[: tokens // 200], 0)
        return peak_of(model, batch, 1024, accelerator)

    assert peak(tokens) < 1.05 * room
    assert peak(2 * tokens) > room


def test_the_peak_of_a_pass_counts_memory_that_is_given_back_before_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 256 * 2**20

    def touch(*_: Any) -> None:
        with mmap.mmap(-1, size) as pages:
            for place in range(0, size, mmap.PAGESIZE):
                pages[place] = 1

    monkeypatch.setattr(auto_micro_batch, "_forward_backward", touch)
    before = auto_micro_batch.memory_used(torch.device("cpu"))
    # Only half, because a system short of memory may meanwhile take other pages of this process.
    assert (auto_micro_batch._peak_of(None, None, 1024, alone()) or 0) > before + size // 2


def test_losses_are_the_same_with_and_without_auto_micro_batch(train: Train) -> None:
    flags = ("--global_batch_size", "2", "--lora_dropout", "0", "--logging_steps", "1")
    plain, auto = (
        log_of(train("plain", *flags)),
        log_of(train("auto", *flags, "--auto_micro_batch")),
    )
    assert [e["loss"] for e in auto] == pytest.approx([e["loss"] for e in plain], abs=1e-6)


@pytest.mark.parametrize("config", ["ddp", "zero2", *SLOW_CONFIGS])
def test_on_two_ranks_the_search_leaves_no_trace(
    config: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Both runs have the same micro-batches, each with all examples of a rank's window."""
    texts = [[f"What is {n}?", "No " + "idea. " * n] for n in range(8)]
    flags: list[str | Path] = ["--model_name_or_path", tiny_model, "--max_steps", "4"]
    flags += ["--data_path", write_dialogues(tmp_path / "data.json", *texts)]
    flags += ["--mixed_precision", "no", "--learning_rate", "1e-2", "--logging_steps", "1"]
    flags += ["--global_batch_size", "8", "--per_device_train_batch_size", "4"]
    limits = ("--tokens_per_micro_batch", "100000"), ("--auto_micro_batch", "True")
    logs = [
        launch(config, tmp_path / str(n), *flags, *limit, processes=2)
        for n, limit in enumerate(limits)
    ]
    assert [entry["loss"] for entry in logs[0]] == [entry["loss"] for entry in logs[1]]
    plain, auto = (adapter_of(tmp_path / str(n)) for n in range(2))
    assert all(torch.equal(tensor, auto[name]) for name, tensor in plain.items())


def test_a_longest_example_that_does_not_fit_is_an_error(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_micro_batch, "memory_room", lambda _: 1)
    with pytest.raises(UserError, match="the longest example alone does not fit"):
        train("none", "--auto_micro_batch")


@pytest.mark.slow
def test_no_step_leaves_tensors_behind(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [["What is " + "very " * n + "long?", "No " + "idea. " * n] for n in range(40)]
    held: list[int] = []
    observe = Tracker.observe

    def counted(*arguments: Any) -> None:
        observe(*arguments)
        if len(held) % 10 == 0:
            gc.collect()
        held.append(sum(isinstance(each, torch.Tensor) for each in gc.get_objects()))

    monkeypatch.setattr(Tracker, "observe", counted)
    flags = ("--data_path", write_dialogues(tmp_path / "long.json", *texts))
    train("run", *flags, "--max_steps", "120", "--logging_steps", "10", "--save_steps", "10")
    assert len(held) == 120
    # Prefetched windows change the number by a few tensors. One tensor per step would add 80.
    assert max(held[80:]) < max(held[20:40]) + 20, held
