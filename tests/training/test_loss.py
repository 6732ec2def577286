"""With the LM head in chunks of supervised positions, loss and gradients do not change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.batching.collate import collate
from data.encoding.encode import Example, encode_dialogues
from loop.config.flags import DUMMY_DATA
from loop.training.loss import supervised_loss_sum
from tests.support.helpers import dialogues_in

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    dialogues, tally = dialogues_in(DUMMY_DATA)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [*encode_dialogues(dialogues[:5], "chat", tokenizer, 128, tally)]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def plain_loss_sum(model: Any, examples: list[Example], pad_id: int) -> torch.Tensor:
    """Return the loss sum from all logits, with an attention mask and shifted labels."""
    longest = max(len(example.input_ids) for example in examples)
    pads = [longest - len(example.input_ids) for example in examples]
    rows = zip(examples, pads, strict=True)
    ids = torch.tensor([e.input_ids + [pad_id] * pad for e, pad in rows])
    labels = torch.tensor([e.labels + [-100] * pad for e, pad in zip(examples, pads, strict=True)])
    mask = torch.tensor(
        [[1] * len(e.input_ids) + [0] * pad for e, pad in zip(examples, pads, strict=True)]
    )
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def gradients(model: Any, loss: torch.Tensor) -> Gradients:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: Gradients, expected: Gradients) -> None:
    assert {*found} == {*expected}
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(found[name], gradient, atol=1e-6 * max(1.0, scale)), name


@pytest.mark.parametrize("pad_id", [0, 2])  # 2 is also the end token of answers
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_the_loss_and_its_gradients_equal_the_plain_ones(
    model: Any, examples: list[Example], pad_id: int, frozen: bool, chunk: int
) -> None:
    model.lm_head.requires_grad_(not frozen)
    plain = plain_loss_sum(model, examples, pad_id)
    expected = gradients(model, plain)
    ours = supervised_loss_sum(model, collate(examples, pad_id, seed=0), chunk)
    found = gradients(model, ours)
    supervised = sum(example.supervised_tokens for example in examples)
    assert ours.item() / supervised == pytest.approx(plain.item() / supervised, rel=1e-6)
    assert_equal(found, expected)


def test_one_micro_batch_equals_its_parts(model: Any, examples: list[Example]) -> None:
    whole = gradients(model, supervised_loss_sum(model, collate(examples, 2, seed=0)))
    parts = [collate([example], 2, seed=0) for example in examples]
    losses = [supervised_loss_sum(model, part) for part in parts]
    assert_equal(gradients(model, torch.stack(losses).sum()), whole)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_micro_batch_without_examples_has_zero_loss_and_gradients(
    model: Any, frozen: bool
) -> None:
    model.lm_head.requires_grad_(not frozen)
    loss = supervised_loss_sum(model, collate([], 2, seed=0))
    assert loss.item() == 0
    found = gradients(model, loss)
    assert {"model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"} <= {*found}
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_head_runs_on_supervised_positions_only_a_chunk_at_a_time(
    model: Any, examples: list[Example], frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.lm_head.requires_grad_(not frozen)
    rows, linear = [], nn.functional.linear

    def counted(x: torch.Tensor, weight: torch.Tensor, *bias: Any) -> torch.Tensor:
        if weight is model.lm_head.weight or weight.shape == model.lm_head.weight.shape:
            rows.append(x.flatten(0, -2).shape[0])
        return linear(x, weight, *bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    supervised_loss_sum(model, collate(examples, 2, seed=0), 50)
    supervised = sum(example.supervised_tokens for example in examples)
    assert sum(rows) == supervised
    assert max(rows) <= 50
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 1000)  # unchanged


def test_a_model_that_alters_its_logits_gets_all_supervised_ones(
    model: Any, examples: list[Example]
) -> None:
    plain = supervised_loss_sum(model, collate(examples, 2, seed=0))
    model.config.logits_scaling = 2.0
    model.lm_head.register_forward_hook(lambda _head, _inputs, logits: logits / 2)
    halved = supervised_loss_sum(model, collate(examples, 2, seed=0))
    assert halved.item() != pytest.approx(plain.item(), rel=1e-3)
    logits = model(input_ids=torch.tensor([examples[0].input_ids])).logits[0, :-1]
    labels = torch.tensor(examples[0].labels[1:])
    expected = cross_entropy(logits, labels, reduction="sum").item()
    found = supervised_loss_sum(model, collate(examples[:1], 2, seed=0)).item()
    assert found == pytest.approx(expected, rel=1e-6)
