"""The head on supervised positions gives the plain loss and the plain gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.collate import collate
from data.encode import Example, encode_dialogues
from loop.config import DUMMY_DATA
from loop.objective import supervised_loss_sum
from tests.helpers import dialogues_in


@pytest.fixture(scope="module")
def examples(tiny_model: Path) -> list[Example]:
    dialogues, tally = dialogues_in(DUMMY_DATA)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [*encode_dialogues(dialogues[:5], "chat", tokenizer, 128, tally)]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def plain_loss_sum(model: Any, examples: list[Example], pad_id: int) -> torch.Tensor:
    """Compute the loss the slow way: full logits, an attention mask, labels shifted by hand."""
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


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("pad_id", [0, 2])  # 2 is also the token that ends each answer
def test_the_loss_and_its_gradients_equal_the_plain_ones(
    model: Any, examples: list[Example], pad_id: int
) -> None:
    plain = plain_loss_sum(model, examples, pad_id)
    expected = gradients(model, plain)
    ours = supervised_loss_sum(model, collate(examples, pad_id, seed=0))
    found = gradients(model, ours)
    supervised = sum(example.supervised_tokens for example in examples)
    assert ours.item() / supervised == pytest.approx(plain.item() / supervised, rel=1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(found[name], gradient, atol=1e-6 * max(1.0, scale)), name


def test_one_micro_batch_equals_its_parts(model: Any, examples: list[Example]) -> None:
    whole = gradients(model, supervised_loss_sum(model, collate(examples, 2, seed=0)))
    parts = [collate([example], 2, seed=0) for example in examples]
    losses = [supervised_loss_sum(model, part) for part in parts]
    split = gradients(model, torch.stack(losses).sum())
    for name, gradient in whole.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(split[name], gradient, atol=1e-6 * max(1.0, scale)), name


def test_a_micro_batch_without_examples_weighs_nothing(model: Any) -> None:
    loss = supervised_loss_sum(model, collate([], 2, seed=0))
    assert loss.item() == 0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_the_head_runs_on_supervised_positions_only(model: Any, examples: list[Example]) -> None:
    shapes = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(output.shape))
    supervised_loss_sum(model, collate(examples, 2, seed=0))
    model(input_ids=torch.tensor([[1, 2, 3]]))  # afterwards the model is as it was
    supervised = sum(example.supervised_tokens for example in examples)
    assert [tuple(shape[:-1]) for shape in shapes] == [(supervised,), (1, 3)]
