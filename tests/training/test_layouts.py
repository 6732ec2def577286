"""Loss and gradient of a window do not depend on assignment, split, packing or chunks."""

import functools
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.batching.balance import Limits, assign_micro_batches
from data.batching.collate import Collator, MicroBatch
from data.encoding.encode import Example, encode_dialogues
from data.encoding.templates import RenderSettings
from loop.config.flags import DUMMY_DATA
from loop.model.load import _compile_layers
from loop.model.packed_attention import can_pack, implementation, row_inputs
from loop.training.loss import supervised_loss_sum
from tests.support.helpers import dialogues_in, write_dialogues
from tests.training.test_loss import assert_equal, gradients, plain_loss_sum

ROW = Collator(2, None, functools.partial(row_inputs, flash=False), sharing=True)
FORMS = {"padded": Collator(2), "packed": ROW}


@pytest.fixture(scope="module")
def window(tiny_model: Path) -> list[Example]:
    """Eight dialogues of different lengths."""
    dialogues, tally = dialogues_in(DUMMY_DATA)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [*encode_dialogues(dialogues[:8], "chat", tokenizer, 128, tally)]


def adapted(folder: Path, form: str) -> Any:
    """Return the model with an adapter that is not zero; it is the same for all calls."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=implementation(form == "packed", False)
    )
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, adapter)


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> dict[str, Any]:
    return {form: adapted(tiny_model, form) for form in FORMS}


@pytest.fixture(scope="module")
def plain(models: dict[str, Any], window: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss and its gradient, from all logits with an attention mask."""
    model = models["padded"]
    loss = plain_loss_sum(model, window, 0) / sum(e.supervised_tokens for e in window)
    return loss.item(), gradients(model, loss)


def split(window: list[Example], order: str, count: int, ranks: int, form: str) -> list[MicroBatch]:
    """Return the micro-batches of all ranks."""
    if order == "dealt":
        limits = Limits(-(-8 // (count * ranks)), packed=form == "packed")
        assignment = assign_micro_batches(window, ranks, limits)
        parts = [batch.examples for rank in assignment.ranks for batch in rank]
    else:
        size = 8 // (count * ranks)
        parts = [window[i : i + size] for i in range(0, 8, size)]
    return [FORMS[form](part, 0) for part in parts]


@pytest.mark.parametrize(
    ("order", "count", "ranks", "form", "chunk"),
    [*product(("dealt", "in order"), (1, 2, 4), (1, 2), FORMS, (5, 1024))],
)
def test_every_layout_gives_the_plain_loss_and_gradient(
    models: dict[str, Any],
    plain: tuple[float, dict[str, torch.Tensor]],
    window: list[Example],
    order: str,
    count: int,
    ranks: int,
    form: str,
    chunk: int,
) -> None:
    batches = split(window, order, count, ranks, form)
    assert len(batches) == count * ranks
    sums = [supervised_loss_sum(models[form], batch, chunk) for batch in batches]
    loss = torch.stack(sums).sum() / sum(e.supervised_tokens for e in window)
    assert loss.item() == pytest.approx(plain[0], abs=1e-6)
    assert_equal(gradients(models[form], loss), plain[1])


def test_no_dialogue_of_a_row_sees_another(models: dict[str, Any], window: list[Example]) -> None:
    """A dialogue's logits do not depend on the dialogues before or after it in its row."""
    model, one = models["packed"], window[0]
    length, _ = one.lengths
    alone = model(**ROW([one], 0).model_inputs).logits
    rows = [ROW(part, 0).model_inputs for part in ([*window[1:3], one], [one, *window[1:3]])]
    _, own = rows[0]["row"].segments[-1]  # tokens after the shared prefix
    after = model(**rows[0]).logits[:, -own:]
    before = model(**rows[1]).logits[:, :length]
    assert torch.allclose(after, alone[:, -own:], atol=1e-5)
    assert torch.allclose(before, alone, atol=1e-5)
    as_one = model(**{**rows[0], "row": None}).logits
    assert not torch.allclose(as_one[:, -own:], alone[:, -own:], atol=1e-2)


def test_one_example_per_answer_computes_the_tokens_and_the_loss_of_whole_dialogues(
    models: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """The template does not rewrite earlier turns."""
    texts = [
        [f"{n} Why {turn}?" if turn % 2 else f"As {turn}." for turn in range(10)] for n in "ab"
    ]
    file, tokenizer = (
        write_dialogues(tmp_path / "d.json", *texts),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    found = {}
    for multi_turn in ("whole", "each"):
        dialogues, tally = dialogues_in(file)
        settings = RenderSettings(multi_turn=multi_turn)
        part = [*encode_dialogues(dialogues, "chat", tokenizer, 512, tally, settings)]
        limits = Limits(16, packed=True, sharing=True)
        ((batch,),) = assign_micro_batches(part, 1, limits).ranks
        row = ROW(batch.examples, 0, batch.shared)
        loss = supervised_loss_sum(models["packed"], row)
        found[len(part)] = row.tokens, loss.item(), gradients(models["packed"], loss)
    (tokens, loss, gradient), (each_tokens, each_loss, each_gradient) = found.values()
    assert list(found) == [2, 10]
    assert each_tokens == tokens
    assert each_loss == pytest.approx(loss, rel=1e-6)
    assert_equal(each_gradient, gradient)


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "head_dim": 8,
}
KINDS = {
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 16},  # shorter than the dialogues
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "phi3": {"bos_token_id": 1, "eos_token_id": 2},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_many_kinds_have_the_same_loss_packed_and_padded(
    kind: str, window: list[Example]
) -> None:
    config = AutoConfig.for_model(kind, **SMALL | KINDS[kind])
    assert can_pack(config)
    losses = {}
    for form, collator in FORMS.items():
        torch.manual_seed(0)
        attention = implementation(form == "packed", False)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        loss = supervised_loss_sum(model, collator(window, 0))
        losses[form] = loss.item(), gradients(model, loss)
    assert losses["packed"][0] == pytest.approx(losses["padded"][0], rel=1e-6)
    assert_equal(losses["packed"][1], losses["padded"][1])


@pytest.mark.parametrize("kind", ["mamba", "gemma2", "bloom", "t5", "falcon_h1", "llama4_text"])
def test_models_that_mix_positions_outside_attention_are_padded(kind: str) -> None:
    assert not can_pack(AutoConfig.for_model(kind))


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss_and_gradient(
    tiny_model: Path, window: list[Example], plain: tuple[float, dict[str, torch.Tensor]]
) -> None:
    model = adapted(tiny_model, "packed")
    implementation(True, False, compiled=True)  # replaces the attention of the loading
    _compile_layers(model)
    sums = [supervised_loss_sum(model, ROW(part, 0)) for part in (window[:3], window[3:])]
    loss = torch.stack(sums).sum() / sum(e.supervised_tokens for e in window)
    assert loss.item() == pytest.approx(plain[0], abs=1e-6)
    assert_equal(gradients(model, loss), plain[1])
