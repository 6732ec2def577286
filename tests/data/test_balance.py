"""Ranks get even work, micro-batches keep their limits, and there is little padding."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.batching.balance import Limits, assign_micro_batches, packed_tokens, padded_tokens
from data.encoding.encode import Example, encode_dialogues
from tests.support.helpers import dialogues_in


def examples_of(lengths: list[int], targets: list[int] | None = None) -> list[Example]:
    """Return dialogues of these computed lengths, or pairs of these sources and targets."""
    if targets is None:
        rows = [[1] * (n + 1) for n in lengths]  # the last token is only a target
        return [Example(str(i), row, row, len(row) - 1) for i, row in enumerate(rows)]
    both = zip(lengths, targets, strict=True)
    return [Example(str(i), [1] * s, [1] * t, t, is_pair=True) for i, (s, t) in enumerate(both)]


RANDOM = examples_of(np.random.default_rng(0).integers(10, 2000, 64).tolist())


def parts_of(chosen: list[Example], ranks: int, limits: Limits) -> list[list[Example]]:
    """Return all micro-batches, after a check that each example is in exactly one micro-batch."""
    assignment = assign_micro_batches(chosen, ranks, limits)
    parts = [batch.examples for rank in assignment.ranks for batch in rank]
    assert Counter(e.id for part in parts for e in part) == Counter(e.id for e in chosen)
    assert len({len(rank) for rank in assignment.ranks}) == 1
    for rank in assignment.ranks:
        assert rank == [limits.batch(batch.examples) for batch in rank]
    assert max(map(len, parts)) <= limits.examples
    return parts


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("tokens", [100, 1999, 5000, 10**6])
def test_no_micro_batch_exceeds_its_limit_of_tokens(packed: bool, ranks: int, tokens: int) -> None:
    cost = packed_tokens if packed else padded_tokens
    for part in parts_of(RANDOM, ranks, Limits(8, tokens, packed)):
        assert cost(part) <= tokens or len(part) == 1


def test_a_limit_of_tokens_adds_no_more_micro_batches_than_needed() -> None:
    parts = parts_of(examples_of([100] * 64), 1, Limits(64, 800, packed=True))
    assert [len(part) for part in parts] == [8] * 8


@pytest.mark.parametrize("sharing", [False, True])
def test_eight_ranks_have_even_work_on_real_dialogues(sharing: bool, shared: Path) -> None:
    from transformers import LlamaTokenizer

    folder = shared / "tokenizers/mistral_v1"
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)
    dialogues, tally = dialogues_in(shared / "data/oasst_en.json")
    examples = [*encode_dialogues(dialogues, "vicuna", tokenizer, 2048, tally)]
    order = np.random.default_rng(0).permutation(len(examples))
    busiest = total = 0
    for begin in range(0, len(order), 128):
        chosen = [examples[i] for i in order[begin : begin + 128]]
        tokens = assign_micro_batches(chosen, 8, Limits(4, packed=True, sharing=sharing)).tokens
        busiest, total = busiest + max(tokens), total + sum(tokens)
    assert 1 - total / (8 * busiest) < 0.01


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("tokens", [None, 2500])
def test_swaps_between_ranks_keep_the_limits(tokens: int | None, sharing: bool) -> None:
    draw = np.random.default_rng(1)
    for ranks, each in ((2, 4), (5, 2), (8, 1)):
        chosen = examples_of(draw.integers(10, 800, 61).tolist())
        parts = parts_of(chosen, ranks, Limits(each, tokens, packed=True, sharing=sharing))
        if tokens:
            assert all(packed_tokens(part) <= tokens or len(part) == 1 for part in parts)


def test_swaps_between_equally_busy_ranks_lose_no_example() -> None:
    """With shared prefixes, a swap of a micro-batch with itself seems to save tokens."""
    for seed in range(200):
        draw = random.Random(seed)
        chosen = []
        for number in range(12):
            prefix = [draw.choice([1, 2])] * draw.randint(17, 26)
            answer = [draw.randint(6, 9) for _ in range(draw.randint(2, 4))]
            labels = [-100] * len(prefix) + answer
            chosen.append(Example(str(number), prefix + answer, labels, len(answer)))
        parts_of(chosen, 2, Limits(3, packed=True, sharing=True))


def test_pairs_are_split_further_where_that_saves_padding() -> None:
    draw = np.random.default_rng(0)
    # As in real data, many pairs are short and few are long.
    uneven = examples_of(*(10 ** draw.uniform(1, 3, (2, 64))).astype(int).tolist())
    coarse, fine = (parts_of(uneven, 2, Limits(16, finer=finer)) for finer in (False, True))
    assert len(fine) > len(coarse)
    assert sum(map(padded_tokens, fine)) < 0.7 * sum(map(padded_tokens, coarse))
    idle = [
        1 - sum(assignment.tokens) / (2 * max(assignment.tokens))
        for assignment in (
            assign_micro_batches(uneven, 2, Limits(16, finer=finer)) for finer in (False, True)
        )
    ]
    assert idle[1] < 0.5 * idle[0]
    even = examples_of([20] * 64, [20] * 64)
    assert len(parts_of(even, 2, Limits(16, finer=True))) == len(parts_of(even, 2, Limits(16)))


def test_a_short_last_window_runs_fewer_micro_batches() -> None:
    assert len(parts_of(examples_of([5, 6, 7]), 1, Limits(4, packed=True))) == 1
    assert len(parts_of(examples_of([5]), 4, Limits(4, packed=True))) == 4  # three are empty


def answers_of(record: int, turns: int) -> list[Example]:
    """Return the examples of a dialogue's answers, each with its history of 30 tokens a turn."""
    ids = [record] * 30 * turns
    return [
        Example(f"{record} {n}", ids[: 30 * n], [-100] * (30 * n - 5) + ids[:5], 5, record, turn=n)
        for n in range(1, turns + 1)
    ]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tokens", [None, 600])
def test_the_examples_of_a_dialogue_stay_together(ranks: int, tokens: int | None) -> None:
    """Four examples of a dialogue have 296 tokens, and compute 119 of them."""
    chosen = [example for record in range(1, 9) for example in answers_of(record, 4)]
    random.Random(0).shuffle(chosen)
    limits = Limits(8, tokens, packed=True, sharing=True)
    parts = parts_of(chosen, ranks, limits)
    assert [len({e.record for e in part}) for part in parts] == [2] * 4
    assert [limits.batch(part).tokens for part in parts] == [2 * 119] * 4


def test_a_dialogue_beyond_the_limits_is_divided() -> None:
    chosen = answers_of(1, 7)
    limits = Limits(4, packed=True, sharing=True)
    assert sorted(len(part) for part in parts_of(chosen, 1, limits)) == [3, 4]
    limits = Limits(8, 300, packed=True, sharing=True)
    for part in parts_of(chosen, 2, limits):
        assert packed_tokens(part) <= 300


def test_examples_without_turns_are_assigned_one_by_one() -> None:
    chosen = [replace(example, turn=None) for example in answers_of(1, 4)]
    parts = parts_of(chosen, 2, Limits(4, packed=True, sharing=True))
    assert sorted(len(part) for part in parts) == [2, 2]
