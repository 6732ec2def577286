"""Evaluation is exact for every layout and does not change training."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from data.errors import Stopped
from loop.config.flags import Config
from loop.config.load import read_config
from loop.inputs.training_data import TrainingData, read_training_data
from loop.training import evaluation
from tests.checkpoint.test_storage import cut_off, same
from tests.conftest import trainer
from tests.support.helpers import launch, log_of, write_dialogues
from tests.support.matrix import share_all_file

Train = Callable[..., Path]
Entry = dict[str, Any]
LOG = ("--logging_steps", "1", "--lora_dropout", "0.3", "--max_steps", "6")
# Eleven dialogues in micro-batches of three. The last micro-batch has two dialogues, and on two
# ranks another one is empty.
SHORT, LONG = "Hello there, it is good to see you. ", "So it is, and so it will be for long. "
ELEVEN = [["Hi " * n, SHORT * (n % 4 + 1), "And?", LONG * (n % 3 + 1)] for n in range(1, 12)]
TRAINED = [["Hi, who is it? " * n, LONG * n] for n in range(1, 3)]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    return write_dialogues(tmp_path / "held_out.json", *ELEVEN)


@pytest.fixture
def train(tiny_model: Path, held_out: Path, tmp_path: Path) -> Train:
    run = trainer(tiny_model, tmp_path)
    return lambda name, *flags: run(name, *LOG, "--eval_data_path", held_out, *flags)


def evaluations(output: Path) -> list[Entry]:
    """Return a run's evaluations without their times."""
    found = [entry for entry in log_of(output) if "eval_loss" in entry]
    return [{k: v for k, v in e.items() if not k.endswith("seconds")} for e in found]


def samples(output: Path) -> list[Entry]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def prepared_for(model: Path, data: Path, *flags: str) -> TrainingData:
    words = ["--model_name_or_path", str(model), "--data_path", str(data), *flags]
    return read_training_data(read_config(words, Config))


def plain_figures(model: Any, prepared: TrainingData) -> tuple[float, float]:
    """Return loss and accuracy, computed one dialogue at a time with all logits."""
    loss, right, count = 0.0, 0, 0
    for example in prepared.held_out or []:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        inputs = {"input_ids": ids}
        if example.is_pair:
            start = prepared.base.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.tensor([[start, *example.labels[:-1]]])
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        if not example.is_pair:
            logits, labels = logits[:-1], labels[1:]
        kept = labels != -100
        loss += cross_entropy(logits[kept].double(), labels[kept], reduction="sum").item()
        right += int((logits[kept].argmax(-1) == labels[kept]).sum())
        count += int(kept.sum())
    return loss / count, right / count


def loaded(model: Path, adapter: Path, pairs: bool) -> Any:
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    base = loader.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("decoder", "zero3"),
        ("T5", "ddp"),
        *[pytest.param("decoder", config, marks=pytest.mark.slow) for config in ("ddp", "zero2")],
        pytest.param("T5", "zero3", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_evaluate_as_one_and_as_the_plain_model(
    kind: str, config: str, held_out: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pairs = kind == "T5"
    model = request.getfixturevalue("tiny_t5" if pairs else "tiny_model")
    data = write_dialogues(tmp_path / "trained.json", *TRAINED)
    begun = ("--data_path", data, "--learning_rate", "0.1", "--max_steps", "8")
    start = trainer(model, tmp_path)("start", *begun)
    flags: list[str | Path] = ["--model_name_or_path", model, "--data_path", data]
    # The learning rate is too small to change the weights.
    flags += ["--lora_weight_path", start, "--learning_rate", "1e-30", "--mixed_precision", "no"]
    flags += ["--max_steps", "2", "--eval_data_path", held_out, "--eval_steps", "1"]
    flags += ["--per_device_eval_batch_size", "3", "--sample_tokens", "4"]
    flags += ["--sample_prompts", "Who are you?", "And?"]
    launch("cpu", tmp_path / "one", *flags, "--global_batch_size", "2")
    more = ["--deepspeed", share_all_file(tmp_path)] if config == "zero3" else []
    more += ["--global_batch_size", "2"]
    launch(config, tmp_path / "two", *flags, *more, processes=2)
    one, two = evaluations(tmp_path / "one"), evaluations(tmp_path / "two")
    assert [entry["step"] for entry in two] == [1, 2]
    prepared = prepared_for(model, data, "--eval_data_path", str(held_out))
    loss, accuracy = plain_figures(loaded(model, start, pairs), prepared)
    for entry in [*one, *two]:
        assert entry["eval_loss"] == pytest.approx(loss, abs=1e-6)
        assert entry["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
        assert entry["eval_token_accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert {*entry["eval_loss_by_turn"]} == {"1", "2"}
    assert two[0]["eval_loss_by_turn"] == pytest.approx(one[0]["eval_loss_by_turn"], abs=1e-6)
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    assert len(samples(tmp_path / "one")) == 4


@pytest.mark.parametrize("more", [(), ("--q_lora", "True"), ("--gradient_checkpointing", "True")])
def test_training_is_the_same_with_and_without_evaluation(
    more: tuple[str, ...], train: Train, tmp_path: Path
) -> None:
    sampled = ("--sample_prompts", "Hi", "--sample_tokens", "2", "--eval_steps", "1")
    with_it = train("with", *sampled, *more)
    without = train("without", "--eval_strategy", "no", *more)
    assert same(with_it, without)
    assert [entry["step"] for entry in evaluations(with_it)] == [*range(1, 7)]
    assert not evaluations(without)
    losses = [[e["loss"] for e in log_of(run) if "loss" in e] for run in (with_it, without)]
    assert losses[0] == losses[1]


def test_trackers_get_losses_by_source_whose_mean_is_the_total(
    train: Train, held_out: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    other = write_dialogues(tmp_path / "other.json", ["Who?", "It is I."], ["Who?", "It is you."])
    flags = ("--eval_data_path", other, held_out, "--eval_steps", "6", "--max_steps", "6")
    output = train("run", *flags, "--report_to", "tensorboard")
    alone = train("alone", "--eval_data_path", other, "--eval_steps", "6")
    (whole,), (part,) = evaluations(output), evaluations(alone)
    by_source = whole["eval_loss_by_source"]
    assert by_source[str(other)] == pytest.approx(part["eval_loss"], abs=1e-6)
    rest = whole["eval_tokens"] - part["eval_tokens"]
    total = by_source[str(other)] * part["eval_tokens"] + by_source[str(held_out)] * rest
    assert total / whole["eval_tokens"] == pytest.approx(whole["eval_loss"], abs=1e-9)
    (folder,) = (output / "tensorboard").glob("*")
    events = EventAccumulator(str(folder))
    events.Reload()
    (found,) = events.Scalars("eval/loss")
    assert (found.step, found.value) == (6, pytest.approx(whole["eval_loss"], rel=1e-6))
    assert f"eval/loss_by_source{other}" in events.Tags()["scalars"]


@pytest.mark.parametrize("config", ["zero3", pytest.param("zero2", marks=pytest.mark.slow)])
def test_training_on_two_ranks_is_the_same_with_and_without_evaluation(
    config: str, tiny_model: Path, held_out: Path, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "data.json", *[["Hi", "Yo " * n] for n in range(1, 6)])
    flags: list[str | Path] = ["--model_name_or_path", tiny_model, "--data_path", data]
    flags += ["--max_steps", "4", "--learning_rate", "1e-2", "--lora_dropout", "0.3"]
    flags += ["--global_batch_size", "4", "--eval_data_path", held_out]
    if config == "zero3":
        flags += ["--deepspeed", share_all_file(tmp_path)]
    for name, steps in (("with", "1"), ("without", "9")):
        strategy = "steps" if name == "with" else "no"
        more = ("--eval_steps", steps, "--eval_strategy", strategy)
        launch(config, tmp_path / name, *flags, *more, processes=2)
    assert same(tmp_path / "with", tmp_path / "without")
    assert len(evaluations(tmp_path / "with")) == 4


def at_evaluation(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM in the middle of the given evaluation, counted from 1."""
    sums, losses = evaluation.Evaluator._sums, evaluation.token_losses
    begun: list[int] = []

    def counted(self: Any) -> Any:
        begun.append(0)
        return sums(self)

    def interrupted(*arguments: Any) -> Any:
        begun[-1] += 1
        assert not (len(begun) == number and begun[-1] == 3), "it continues after a stop request"
        if len(begun) == number and begun[-1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(*arguments)

    monkeypatch.setattr(evaluation.Evaluator, "_sums", counted)
    monkeypatch.setattr(evaluation, "token_losses", interrupted)


@pytest.mark.parametrize(("number", "step"), [(1, 2), (3, 6)])
def test_a_stop_interrupts_an_evaluation_and_the_resumed_run_repeats_it(
    number: int, step: int, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--eval_steps", "2", "--per_device_eval_batch_size", "2")
    reference = train("reference", *flags)
    for _ in range(2):  # The second stop interrupts the repeated evaluation.
        with monkeypatch.context() as patch:
            at_evaluation(number, patch)
            with pytest.raises(Stopped, match=f"SIGTERM was received; checkpoint-{step} is saved"):
                train("run", *flags)
        number = 1
    run = train("run", *flags)
    assert same(run, reference)
    assert evaluations(run) == evaluations(reference)
    steps = [[e["step"] for e in log_of(output)] for output in (run, reference)]
    assert steps[0] == steps[1]


def test_a_killed_run_evaluates_at_the_same_steps_and_keeps_the_best(
    train: Train, tmp_path: Path
) -> None:
    flags = ("--eval_steps", "2", "--save_steps", "2", "--load_best_model_at_end", "True")
    flags += ("--sample_prompts", "Hi", "--sample_tokens", "3")
    reference = train("reference", *flags)
    run = shutil.copytree(reference, tmp_path / "run")
    cut_off(run, after=4)
    train("run", *flags)
    assert same(run, reference)
    assert evaluations(run) == evaluations(reference)
    assert samples(run) == samples(reference)
    progress = [
        json.loads((o / "checkpoint-6/progress.json").read_text()) for o in (run, reference)
    ]
    assert progress[0]["best_metric"] == progress[1]["best_metric"]
    assert progress[0]["best_metric"] == min(e["eval_loss"] for e in evaluations(run))


@pytest.mark.parametrize("kind", ["decoder", "T5"])
def test_held_out_dialogues_are_complete_not_trained_on_and_stay_when_data_grows(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = request.getfixturevalue("tiny_t5" if kind == "T5" else "tiny_model")
    many = [
        [f"Number {n}?", "It is very much so.", "And why is that?", "It is so because it is."]
        for n in range(60)
    ]

    def parts(*dialogues: list[str]) -> tuple[set[str], set[str], TrainingData]:
        data = write_dialogues(tmp_path / "many.json", *dialogues)
        found = prepared_for(model, data, "--eval_fraction", "0.25")
        known = {f"d{number}": turns[0] for number, turns in enumerate(dialogues)}
        assert found.held_out is not None
        trained, held = ({known[e.id] for e in part} for part in (found.examples, found.held_out))
        assert not trained & held
        assert trained | held == {turns[0] for turns in dialogues}
        assert len(found.examples) + len(found.held_out) == len(dialogues) * (
            2 if kind == "T5" else 1
        )
        return trained, held, found

    if kind == "decoder":
        many = [turns[:2] for turns in many]
    _, held, found = parts(*many[:30])
    assert 2 <= len(held) <= 15
    tally = found.examples.tally
    assert tally.read == tally.kept + tally.dropped.total() == 30
    assert tally.noted["examples held out for evaluation"] == len(found.held_out or [])
    _, grown, _ = parts(*reversed(many))
    assert held <= grown
    assert grown & {turns[0] for turns in many[:30]} == held
