"""Windows do not depend on the layout; every example is seen once per epoch."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from data.batching.balance import _similar_parts
from data.batching.collate import Collator
from data.dialogues.sharegpt import Tally
from data.encoding.cache import Examples, in_memory
from data.encoding.encode import Example
from loop.config.flags import Config
from loop.distributed.layout import plan_layout
from loop.inputs.windows import Window, _firsts, drawn, windows
from loop.training.optim import lr_at

EXAMPLES = [
    Example(str(i), [100 + i] * n, [-100] + [100 + i] * (n - 1), n - 1)
    for i, n in enumerate([3, 9, 4, 4, 7, 2, 5, 8, 6, 3, 11])
]


def config(**values: object) -> Config:
    return Config(model_name_or_path="x", **values)


def ranks(rank: int, world_size: int) -> Any:
    return SimpleNamespace(process_index=rank, num_processes=world_size)


def run(rank: int, world_size: int, **values: object) -> list[Window]:
    place = ranks(rank, world_size)
    layout = plan_layout(config(num_train_epochs=2, **values), len(EXAMPLES), place)
    return list(windows(EXAMPLES, layout, seed=1, collate=Collator(0)))


def seen(window: Window) -> Counter[int]:
    """Return the examples of a rank's micro-batches; an example's token is its number."""
    rows = [row for batch in window.micro_batches for row in batch.model_inputs["input_ids"]]
    return Counter(int(row[0]) for row in rows if row[0] != 0)


LAYOUTS = [
    (world_size, {"global_batch_size": 4, "per_device_train_batch_size": per_device})
    for world_size in (1, 2, 3, 8)
    for per_device in (1, 2, 4)
]


@pytest.mark.parametrize(("world_size", "values"), LAYOUTS)
def test_each_layout_holds_the_same_windows(world_size: int, values: dict[str, int]) -> None:
    expected = [seen(window) for window in run(0, 1, global_batch_size=4)]
    ranks = [run(rank, world_size, **values) for rank in range(world_size)]
    assert [len(windows) for windows in ranks] == [6] * world_size
    for step, parts in enumerate(zip(*ranks, strict=True)):
        assert sum(map(seen, parts), Counter()) == expected[step]
        assert len({len(part.micro_batches) for part in parts}) == 1
        assert len({(p.tokens, p.supervised_tokens, p.examples) for p in parts}) == 1
        targets = sum(len(b.targets) for part in parts for b in part.micro_batches)
        assert targets == parts[0].supervised_tokens
        rows = [b.model_inputs["input_ids"] for part in parts for b in part.micro_batches]
        assert max(map(len, rows)) <= values["per_device_train_batch_size"]


def test_every_example_is_seen_once_an_epoch_in_a_new_order() -> None:
    all_windows = run(0, 1, global_batch_size=4)
    first = [seen(window) for window in all_windows[:3]]
    second = [seen(window) for window in all_windows[3:]]
    once = Counter(example.input_ids[0] for example in EXAMPLES)
    assert sum(first, Counter()) == sum(second, Counter()) == once
    assert first != second
    assert [len(list(part.elements())) for part in first] == [4, 4, 3]
    assert [window.epoch for window in all_windows] == [
        4 / 11,
        8 / 11,
        1,
        1 + 4 / 11,
        1 + 8 / 11,
        2,
    ]


def answers(lengths: list[int]) -> list[Example]:
    """Return dialogues with an example per answer: that many examples of each record."""
    return [
        Example(f"{record} {turn}", [7, record, turn], [-100, 7, 7], 2, record, turn=turn)
        for record, length in enumerate(lengths)
        for turn in range(length)
    ]


def chosen_ids(examples: Sequence[Example], seed: int, start: int = 0) -> list[list[str]]:
    """Return the ids of each window of two epochs, from step `start`."""
    layout = plan_layout(config(num_train_epochs=2, global_batch_size=4), 18, ranks(0, 1))
    return [[example.id for example in part] for _, part in drawn(examples, layout, seed, start)]


def test_the_examples_of_one_dialogue_are_neighbours_in_every_epoch() -> None:
    lengths = [5, 1, 4, 2, 6]
    found = chosen_ids(answers(lengths), seed=3)
    assert [len(part) for part in found] == 2 * [4, 4, 4, 4, 2]
    epochs = [[name.split() for part in found[n : n + 5] for name in part] for n in (0, 5)]
    for epoch in epochs:
        runs = {record: [*run] for record, run in groupby(epoch, key=lambda name: name[0])}
        assert {int(record): len(run) for record, run in runs.items()} == dict(enumerate(lengths))
        assert all(
            [turn for _, turn in run] == [*map(str, range(len(run)))] for run in runs.values()
        )
    assert epochs[0] != epochs[1]
    assert chosen_ids(answers(lengths), seed=3, start=7) == found[7:]
    assert chosen_ids(answers(lengths), seed=4) != found


@pytest.mark.parametrize("records", [[0] * 18, [*range(18)]], ids=["one record", "one each"])
def test_other_examples_are_permuted_one_by_one(records: list[int]) -> None:
    """Pairs of one dialogue have one record, too; only `turn` makes examples neighbours."""
    examples = [Example(str(n), [7, 8], [7, 8], 1, record) for n, record in enumerate(records)]
    expected = [*map(str, np.random.default_rng([3, 0]).permutation(18))]
    assert [*chain(*chosen_ids(examples, seed=3)[:5])] == expected


def test_the_order_is_found_without_reading_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = answers([5, 1, 4, 2, 6])
    stored = in_memory(examples, Tally())
    for part in (stored, stored.held_out(0.0)[0]):
        assert chosen_ids(part, seed=3) == chosen_ids(examples, seed=3)
    monkeypatch.setattr(Examples, "_batch", None)  # reads a batch with its ids
    assert _firsts(stored).tolist() == _firsts(examples).tolist() == [0, 5, 6, 10, 12]


def test_each_rank_and_slot_has_its_own_seed() -> None:
    seeds = [
        batch.seed
        for rank in (0, 1)
        for window in run(rank, 2, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        for batch in window.micro_batches
    ]
    assert len({*seeds}) == len(seeds)


def test_neighbours_in_length_share_a_micro_batch() -> None:
    window = run(0, 1, global_batch_size=11, per_device_train_batch_size=3)[0]
    padded = sum(batch.model_inputs["input_ids"].numel() for batch in window.micro_batches)
    assert window.tokens == 51  # not 62, because the last token of each example is only a target
    assert padded == 60  # one micro-batch would have 110


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, (2, 3, 12)),
        ({"per_device_train_batch_size": 4, "global_batch_size": 12}, (4, 2, 12)),
        ({"per_device_train_batch_size": 4, "global_batch_size": 5}, (3, 1, 5)),
        ({}, (8, 1, 16)),
        ({"gradient_accumulation_steps": 10**9}, (8, 7, 100)),
    ],
)
def test_the_batch_arithmetic_of_two_ranks(
    values: dict[str, int], expected: tuple[int, int, int]
) -> None:
    layout = plan_layout(config(**values), 100, ranks(0, 2))
    assert (layout.micro_batch_size, layout.accumulation, layout.global_batch_size) == expected


def test_steps_follow_epochs_or_max_steps() -> None:
    assert (
        plan_layout(config(num_train_epochs=1.5), 100, ranks(0, 1)).total_steps == 20
    )  # 13 an epoch
    assert plan_layout(config(max_steps=3), 100, ranks(0, 1)).total_steps == 3


@pytest.mark.parametrize("steps", [1, 10, 101])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_the_learning_rate_is_transformers_value(name: str, schedule: object, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-5)
    warmup = -(-3 * steps // 100)
    theirs = schedule(optimizer, warmup, steps)
    for step in range(steps):
        ours = lr_at(step, steps, config(lr_scheduler_type=name))
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        theirs.step()


def padded(parts: list[list[Example]]) -> int:
    """Return the tokens of these micro-batches, with padding."""
    return sum(
        len(part) * sum(max(e.lengths[side] for e in part) for side in range(2)) for part in parts
    )


def test_pairs_of_a_micro_batch_have_similar_lengths_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 500, (128, 2)).tolist()
    pairs = [Example(str(s), [1] * s, [1] * t, t, is_pair=True) for s, t in sizes]
    parts = _similar_parts(pairs, 32)
    assert [len(part) for part in parts] == [4] * 32
    assert Counter(e.id for part in parts for e in part) == Counter(e.id for e in pairs)
    by_source = sorted(pairs, key=lambda e: -e.lengths[0])
    by_longer = sorted(pairs, key=lambda e: -max(e.lengths))
    for order in (by_source, by_longer):
        assert padded(parts) < 0.9 * padded([order[i : i + 4] for i in range(0, 128, 4)])


@pytest.mark.parametrize("examples", [0, 1, 5, 7, 10, 11, 12])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_no_part_is_larger_than_an_even_split_makes_it(examples: int, parts: int) -> None:
    found = _similar_parts((EXAMPLES * 2)[:examples], parts)
    assert len(found) == parts
    assert sum(map(len, found)) == examples
    assert max(map(len, found)) <= -(-examples // parts)
