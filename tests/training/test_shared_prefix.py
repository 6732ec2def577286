"""Shared prefixes are computed once, and losses and gradients do not change."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.batching.balance import Limits, assign_micro_batches, packed_tokens
from data.batching.collate import Collator, MicroBatch
from data.batching.shared_prefix import (
    MIN_PREFIX_TOKENS,
    shared_prefixes,
    sort_by_prefix,
    tokens_saved,
)
from data.encoding.encode import Example
from data.errors import UserError
from loop.config.flags import Config
from loop.distributed.layout import plan_layout
from loop.inputs.windows import windows
from loop.model import packed_attention
from loop.model.packed_attention import implementation, row_inputs
from loop.monitor.metrics import Work, rates
from loop.training.loss import supervised_loss_sum
from tests.training.test_layouts import KINDS, SMALL
from tests.training.test_loss import assert_equal, gradients

PADDED = Collator(0)
ALONE = Collator(0, None, functools.partial(row_inputs, flash=False))
SHARING = Collator(0, None, functools.partial(row_inputs, flash=False), sharing=True)


def dialogue(name: str, beginning: list[int], own: list[int], supervised: int = 2) -> Example:
    """Return a dialogue whose last tokens are supervised."""
    ids = beginning + own
    return Example(name, ids, [-100] * (len(ids) - supervised) + ids[-supervised:], supervised)


def random_dialogues(seed: int, count: int = 12) -> list[Example]:
    """Return random dialogues, each with one of three prefixes; the third is too short to share."""
    draw = np.random.default_rng(seed)
    beginnings = [[1] * 30, [*range(2, 2 + MIN_PREFIX_TOKENS)], [3, 4]]
    found = []
    for number in range(count):
        own = draw.integers(20, 1000, draw.integers(3, 40)).tolist()
        beginning = beginnings[draw.integers(3)]
        found.append(dialogue(str(number), beginning, own, int(draw.integers(1, 3))))
    return found


def nested_dialogues(seed: int, turns: int = 4) -> list[Example]:
    """Return examples of two dialogues with a common system prompt, one per answer.

    Each continues the one before it, and supervises its own answer. The first dialogue's answers
    occur twice, once with other last tokens.
    """
    draw = np.random.default_rng(seed)
    found = []
    for name in "xy":
        ids = [9] * 25
        for turn in range(turns):
            answer = draw.integers(20, 1000, draw.integers(3, 40)).tolist()
            ids = [*ids, *draw.integers(20, 1000, draw.integers(3, 9)).tolist()]
            labels = [-100] * len(ids) + answer
            ids = ids + answer
            found.append(Example(f"{name}{turn}", ids, labels, len(answer), ord(name), turn=turn))
            if name == "x" and len(answer) > 4:
                other = [*ids[:-2], 5, 6]
                targets = [*labels[:-2], 5, 6]
                found.append(Example(f"z{turn}", other, targets, len(answer)))
    return found


def one_batch(examples: list[Example]) -> list[Example]:
    """Return the examples in the order of the single micro-batch that they are assigned to."""
    limits = Limits(64, packed=True, sharing=True)
    ((batch,),) = assign_micro_batches(examples, 1, limits).ranks
    assert batch.shared == shared_prefixes(batch.examples)
    return batch.examples


def unfolded(batch: MicroBatch) -> list[tuple[list[int], list[int]]]:
    """Return for each segment of a row its ids and its positions."""
    ids, places = (batch.model_inputs[name][0].tolist() for name in ("input_ids", "position_ids"))
    found, path, begin = [], [], 0
    for shared, own in batch.model_inputs["row"].segments:
        path = [*path[:shared], *range(begin, begin + own)]
        begin += own
        found.append(([ids[n] for n in path], [places[n] for n in path]))
    assert begin == len(ids)
    return found


def prefixes_of(part: list[Example]) -> set[tuple[int, ...]]:
    """Return all different prefixes of the computed tokens; each needs one hidden state."""
    rows = [example.input_ids[: example.run_tokens] for example in part]
    return {tuple(row[: n + 1]) for row in rows for n in range(len(row))}


@pytest.mark.parametrize("seed", range(20))
def test_a_row_has_each_dialogue_complete_and_each_prefix_once(seed: int) -> None:
    part = one_batch(random_dialogues(seed) + nested_dialogues(seed))
    batch = SHARING(part, 0)
    segments = unfolded(batch)
    begun = {tuple(ids[: n + 1]) for ids, _ in segments for n in range(len(ids))}
    assert begun == prefixes_of(part)
    assert all(places == [*range(len(places))] for _, places in segments)
    wanted = [label for e in part for label in e.labels[1 : e.run_tokens + 1] if label != -100]
    assert batch.targets.tolist() == wanted
    saved, _ = tokens_saved(shared_prefixes(part))
    assert batch.tokens == packed_tokens(part) - saved
    # Only prefixes of fewer than 16 tokens are computed again.
    assert len(begun) <= batch.tokens <= len(begun) + MIN_PREFIX_TOKENS * len(part)


def test_examples_of_one_dialogue_are_the_row_of_the_whole_dialogue() -> None:
    """The template does not rewrite earlier turns."""
    part = [example for example in nested_dialogues(0) if example.id.startswith("y")]
    labels = part[-1].labels[:]
    for example in part:
        labels[: len(example.labels)] = [
            new if new != -100 else old for new, old in zip(example.labels, labels, strict=False)
        ]
    whole = Example("y", part[-1].input_ids, labels, sum(e.supervised_tokens for e in part))
    each, once = SHARING(one_batch(part[::-1]), 0), SHARING([whole], 0)
    assert each.model_inputs["row"].segments == once.model_inputs["row"].segments
    for name in ("input_ids", "position_ids"):
        assert each.model_inputs[name].tolist() == once.model_inputs[name].tolist()
    assert each.positions.tolist() == once.positions.tolist()
    assert each.targets.tolist() == once.targets.tolist()


def test_a_shared_token_may_predict_supervised_tokens_of_several_dialogues() -> None:
    beginning = [*range(10, 40)]
    late, early = (dialogue(name, beginning, [5, 6, 7], n) for name, n in (("a", 2), ("b", 13)))
    other = dialogue("c", beginning, [5, 6, 8], 13)
    assert shared_prefixes([late, early, other]) == [0, 32, 32]
    batch = SHARING([late, early, other], 0)
    assert batch.tokens == 32
    assert batch.positions.tolist() == [30, 31, *range(19, 32), *range(19, 32)]
    labels = [label for example in (late, early, other) for label in example.labels]
    assert batch.targets.tolist() == [label for label in labels if label != -100]


def test_a_common_first_sentence_of_two_system_prompts_is_computed_once() -> None:
    first = [dialogue(f"a{n}", [*range(100)], [n] * 5) for n in range(200, 208)]
    second = [dialogue(f"b{n}", [*range(20), *range(300, 380)], [n] * 5) for n in range(200, 208)]
    short = dialogue("c", [*range(25)], [900] * 5)
    part = sort_by_prefix([*second, short, *first])
    assert shared_prefixes(part) == [0, *[100] * 7, 25, 20, *[100] * 7]
    assert tokens_saved(shared_prefixes(part)) == (1445, 14 * 100**2 + 25**2 + 20**2)


def test_a_single_dialogue_and_an_empty_row_share_nothing() -> None:
    one = dialogue("a", [*range(10, 30)], [5, 6, 7])
    assert shared_prefixes([one]) == [0]
    assert shared_prefixes([]) == []
    assert SHARING([one], 0).model_inputs["row"].segments == [(0, 22)]
    assert SHARING([], 0).tokens == 1
    assert len(SHARING([], 0).targets) == 0


@pytest.mark.parametrize("longest_mask", [0, 1024], ids=["again", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_those_of_each_dialogue_alone(
    kind: str, longest_mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MAX_MASKED_TOKENS", "MAX_MASKED_TOKENS_LONG_PREFIX"):
        monkeypatch.setattr(packed_attention, name, longest_mask)
    part = one_batch(random_dialogues(0) + nested_dialogues(0))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SMALL | KINDS[kind]),
        attn_implementation=implementation(True, False),
    )
    loss = torch.stack([supervised_loss_sum(model, PADDED([e], 0)) for e in part]).sum()
    alone, own = loss.item(), gradients(model, loss)
    batch = SHARING(part, 0)
    assert batch.tokens < 0.6 * packed_tokens(part)
    assert len({*batch.positions.tolist()}) < len(batch.positions)  # shared supervised positions
    loss = supervised_loss_sum(model, batch)
    shared, once = loss.item(), gradients(model, loss)
    assert shared == pytest.approx(alone, rel=1e-6)
    assert_equal(once, own)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_an_earlier_evaluation_change_nothing(reentrant: bool) -> None:
    part = one_batch(random_dialogues(1))
    packed_attention._causal.cache_clear()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **SMALL), attn_implementation=implementation(True, False)
    )
    with torch.inference_mode():  # creates the mask that the backward pass uses
        expected = supervised_loss_sum(model, SHARING(part, 0)).item()
    loss = supervised_loss_sum(model, ALONE(part, 0))
    plain = gradients(model, loss)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss = supervised_loss_sum(model, SHARING(part, 0))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert_equal(gradients(model, loss), plain)


def test_queries_of_a_prefix_are_computed_once_and_all_layers_use_one_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int, int | None]] = []
    function = torch.nn.functional.scaled_dot_product_attention

    def recorded(q: Any, k: Any, v: Any, attn_mask: Any = None, *rest: Any, **options: Any) -> Any:
        storage = None if attn_mask is None else attn_mask.untyped_storage().data_ptr()
        asked.append((q.shape[2], k.shape[2], storage))
        return function(q, k, v, attn_mask, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    row = [torch.randn(1, heads, 60, 16, requires_grad=True) for heads in (4, 2, 2)]
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    row_of = packed_attention.Row([(0, 25), (20, 15), (20, 10), (0, 10)])
    for _ in range(2):
        packed_attention.per_example(layer, row[0], row[1], row[2], None, row_of)
    assert [(q, k) for q, k, _ in asked] == 2 * [(25, 25), (15, 35), (10, 30), (10, 10)]
    masks = {storage for q, k, storage in asked if q < k}
    assert len(masks) == 1
    assert None not in masks


def test_a_window_counts_computed_tokens_and_the_log_has_the_shared_share() -> None:
    examples = [dialogue(str(n), [1] * 30, [n, 7, 8, 9]) for n in range(10, 26)]
    config = Config(per_device_train_batch_size=8, global_batch_size=16, packing=True)
    layout = plan_layout(config, 16, SimpleNamespace(process_index=0, num_processes=1), packed=True)
    assert layout.limits.sharing
    (window, *_) = windows(examples, layout, 0, SHARING)
    run = sum(batch.tokens for batch in window.micro_batches)
    assert (window.tokens, window.padded_tokens, run) == (16 * 33, 2 * (30 + 8 * 3), 2 * 54)
    assert window.squared_tokens == 16 * 33**2 - 14 * 30**2
    count = {
        name: getattr(window, name)
        for name in ("tokens", "padded_tokens", "busiest_tokens", "squared_tokens")
    } | {"supervised_tokens": window.supervised_tokens}
    entry = rates(count, 2.0, 1, Work(linear=10, head=0, trained=0, attention=0, peak=1.0))
    assert entry["shared_share"] == pytest.approx(1 - 108 / 528)
    assert entry["padding_share"] == entry["rank_imbalance"] == 0.0
    assert entry["mfu"] == pytest.approx(4 * 10 * 108 / 2)


def test_flash_attention_shares_no_prefixes() -> None:
    config = Config(flash_attn=True)
    layout = plan_layout(config, 16, SimpleNamespace(process_index=0, num_processes=1), packed=True)
    assert not layout.limits.sharing


def test_the_balance_of_ranks_counts_computed_tokens() -> None:
    alike = [dialogue(f"a{n}", [1] * 200, [n] * 20) for n in range(10, 18)]
    other = [dialogue(f"b{n}", [n] * 110, [n] * 110) for n in range(30, 38)]
    limits = Limits(4, packed=True, sharing=True)
    assignment = assign_micro_batches(alike + other, 2, limits)
    batches = [batch for rank in assignment.ranks for batch in rank]
    collated = [SHARING(batch.examples, 0, batch.shared).tokens for batch in batches]
    assert [batch.tokens for batch in batches] == collated
    assert sum(collated) < sum(packed_tokens(batch.examples) for batch in batches)


def test_the_bundled_dialogues_share_a_quarter(chat_model: Path) -> None:
    from loop.inputs.training_data import read_training_data

    prepared = read_training_data(Config(model_name_or_path=str(chat_model)))
    part = [*prepared.examples][:8]
    batch = prepared.collator(part, 0)
    assert 0.15 < 1 - batch.tokens / packed_tokens(part) < 0.4


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    config = AutoConfig.for_model("bert", **SMALL)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation(packed=True, flash=False)
    )
    part = [dialogue(name, [*range(10, 40)], [5, 6, 7]) for name in "ab"]
    with pytest.raises(UserError, match="BertSelfAttention, in which tokens attend to later ones"):
        supervised_loss_sum(model, SHARING(part, 0))


@pytest.mark.parametrize("sharing", [False, True])
def test_a_backward_pass_keeps_no_more_than_of_dialogues_one_by_one(sharing: bool) -> None:
    """The memory is that of attention, in a row with a shared prefix and a single example."""
    segments = (
        [(0, 116), (16, 100), (16, 100), (0, 300)]
        if sharing
        else [(0, 116), (0, 116), (0, 116), (0, 300)]
    )
    tokens = sum(own for _, own in segments)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = [torch.randn(1, heads, tokens, 16, requires_grad=True) * 1 for heads in (4, 2, 2)]
    layer = SimpleNamespace(is_causal=True, num_key_value_groups=2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_attention.per_example(
            layer, row[0], row[1], row[2], None, packed_attention.Row(segments)
        )
    kept.pop(packed_attention._causal(256, torch.float32).untyped_storage().data_ptr(), None)
    # Queries, keys, values and outputs of 648 tokens, and one number per head and row.
    assert sum(kept.values()) <= 4 * 648 * (16 * (4 + 2 + 2 + 4) + 4) * 1.01
