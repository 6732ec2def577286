"""Work is even over the ranks, micro-batches keep their limits, and little is padded."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.batching.balance import (
    Examples,
    Limits,
    assign_micro_batches,
    packed_tokens,
    padded_tokens,
)
from data.encoding.encode import Example, encode_dialogues
from tests.support.helpers import dialogues_in


def made(lengths: list[int], targets: list[int] | None = None) -> list[Example]:
    """Return examples of these lengths, or pairs."""
    if targets is None:
        rows = [[1] * (n + 1) for n in lengths]  # the last token is a target alone
        return [Example(str(i), row, row, len(row) - 1) for i, row in enumerate(rows)]
    both = zip(lengths, targets, strict=True)
    return [Example(str(i), [1] * s, [1] * t, t, is_pair=True) for i, (s, t) in enumerate(both)]


RANDOM = made(np.random.default_rng(0).integers(10, 2000, 64).tolist())


def parts_of(chosen: list[Example], ranks: int, limits: Limits) -> list[Examples]:
    """Return all micro-batches, after making sure that each example is in just one of them."""
    dealt = assign_micro_batches(chosen, ranks, limits)
    parts = [part for rank in dealt.ranks for part in rank]
    assert Counter(e.id for part in parts for e in part) == Counter(e.id for e in chosen)
    assert len({len(rank) for rank in dealt.ranks}) == 1
    assert dealt.tokens == [sum(map(limits.cost, rank)) for rank in dealt.ranks]
    assert max(map(len, parts)) <= limits.examples
    return parts


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 3, 8])
@pytest.mark.parametrize("tokens", [100, 1999, 5000, 10**6])
def test_no_micro_batch_has_more_tokens_than_it_may(packed: bool, ranks: int, tokens: int) -> None:
    cost = packed_tokens if packed else padded_tokens
    for part in parts_of(RANDOM, ranks, Limits(8, tokens, packed)):
        assert cost(part) <= tokens or len(part) == 1


def test_a_limit_of_tokens_makes_no_more_micro_batches_than_it_needs() -> None:
    parts = parts_of(made([100] * 64), 1, Limits(64, 800, packed=True))
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
        chosen = made(draw.integers(10, 800, 61).tolist())
        parts = parts_of(chosen, ranks, Limits(each, tokens, packed=True, sharing=sharing))
        if tokens:
            assert all(packed_tokens(part) <= tokens or len(part) == 1 for part in parts)


def test_pairs_are_split_further_where_that_saves_padding() -> None:
    draw = np.random.default_rng(0)
    # As real ones: many short, few long.
    uneven = made(*(10 ** draw.uniform(1, 3, (2, 64))).astype(int).tolist())
    coarse, fine = (parts_of(uneven, 2, Limits(16, finer=finer)) for finer in (False, True))
    assert len(fine) > len(coarse)
    assert sum(map(padded_tokens, fine)) < 0.7 * sum(map(padded_tokens, coarse))
    idle = [
        1 - sum(dealt.tokens) / (2 * max(dealt.tokens))
        for dealt in (
            assign_micro_batches(uneven, 2, Limits(16, finer=finer)) for finer in (False, True)
        )
    ]
    assert idle[1] < 0.5 * idle[0]
    even = made([20] * 64, [20] * 64)
    assert len(parts_of(even, 2, Limits(16, finer=True))) == len(parts_of(even, 2, Limits(16)))


def test_a_short_last_window_runs_fewer_micro_batches() -> None:
    assert len(parts_of(made([5, 6, 7]), 1, Limits(4, packed=True))) == 1
    assert len(parts_of(made([5]), 4, Limits(4, packed=True))) == 4  # three of weight zero
