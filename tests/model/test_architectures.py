"""Every architecture of transformers trains as in plain passes, or is refused with the reason."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from transformers import AutoConfig

from tests.support.architectures import REASONS, Outcome, outcome_of, outcomes, reason_of
from tests.support.target_table import PAGE, layout_table
from tests.support.tiny_models import tiny_config

SIZES = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ORIGINAL = {"rope_theta": 1e4, "original_max_position_embeddings": 64}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
MINIMUM = 185  # of the entries in transformers 5.23's two mappings


@pytest.mark.slow
def test_every_architecture_trains_right_or_is_refused_with_the_reason() -> None:
    found = outcomes()
    assert not {name: one for name, one in found.items() if one.result == "wrong"}
    reasons = Counter(reason_of(one) for one in found.values() if one.result == "refused")
    right = sum(one.result == "right" for one in found.values())
    print(f"{right} right of {len(found)}; refused: {dict(reasons)}")
    assert {*reasons} <= {*REASONS}
    assert right >= MINIMUM
    assert layout_table(found) in PAGE.read_text(encoding="utf-8")


def llama(rope: dict[str, Any], positions: int = 512) -> Any:
    return AutoConfig.for_model(
        "llama", **SIZES, **HEADS, max_position_embeddings=positions, rope_parameters=rope
    )


def tiny(model_type: str, **changes: Any) -> Any:
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config.get_text_config() if hasattr(config, "text_config") else config, name, value)
    return config


ROWS, PADDED, ALONE = (
    "rows with shared prefixes",
    "padded micro-batches",
    "micro-batches of one example",
)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (lambda: llama({"rope_type": "yarn", "factor": 8.0, **ORIGINAL}), ROWS),
        (lambda: llama({"rope_type": "longrope", "factor": 8.0, **ORIGINAL, **LONGROPE}), ALONE),
        (lambda: tiny("mistral", sliding_window=16), ROWS),
        (lambda: tiny("phimoe", sliding_window=16), PADDED),
        (lambda: tiny("gemma2", sliding_window=16), PADDED),
        (lambda: tiny("llama4", attention_chunk_size=16), PADDED),
        (lambda: tiny("gemma4", final_logit_softcapping=0.5), ROWS),
        (lambda: tiny("falcon_h1", lm_head_multiplier=0.04), PADDED),
        (lambda: tiny("recurrent_gemma", logits_soft_cap=0.5), PADDED),
        (lambda: tiny("roberta", is_decoder=True), PADDED),
        (lambda: tiny("nemotron"), PADDED),
        (lambda: tiny("nllb-moe"), PADDED),
        (lambda: tiny("gpt_oss"), PADDED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_variant_trains_right_in_the_fastest_layout_that_agrees(
    config: Callable[[], Any], layout: str
) -> None:
    found = outcome_of(config())
    assert (found.result, found.layout) == ("right", layout)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            lambda: llama({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 64),
            "depend on the number of tokens .*Give --model_max_length 64",
        ),
        (lambda: tiny("bert"), "attend to later ones .*Set is_decoder"),
        (lambda: tiny("gemma3", use_bidirectional_attention=True), "attend to later ones"),
        (lambda: tiny("opt", max_position_embeddings=100), "found an example of 11. tokens; .*100"),
        (lambda: tiny("voxtral"), "made of text, audio, which transformers does not load as"),
    ],
    ids=["dynamic NTK", "BERT", "bidirectional Gemma 3", "learned positions", "speech"],
)
def test_a_variant_that_cannot_train_right_is_refused(
    config: Callable[[], Any], reason: str
) -> None:
    found = outcome_of(config())
    assert found.result == "refused"
    assert re.search(reason, found.reason)


def test_the_remedy_for_scaled_positions_works() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert outcome_of(llama(rope, 64)).result == "refused"
    assert outcome_of(llama(rope, 64), model_max_length=64).result == "right"


def tanh_after_head(model: Any) -> None:
    """Change the logits under no name that a configuration could have."""
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits.tanh())


def factor_of_the_rows_length(model: Any) -> None:
    """Scale the embeddings by the number of tokens of a pass."""
    model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, states: states * (1 + inputs[0].shape[1] / 100)
    )


def sum_of_the_row(model: Any) -> None:
    """Let each token see all earlier tokens of a row, also those of other examples."""
    model.model.layers[0].register_forward_hook(
        lambda _module, _inputs, states: states + 0.1 * states.cumsum(1)
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (tanh_after_head, Outcome("right", ROWS)),
        (sum_of_the_row, Outcome("right", PADDED)),
        (factor_of_the_rows_length, Outcome("refused")),
    ],
)
def test_a_broken_model_that_no_list_knows_is_found(
    change: Callable[[Any], None], expected: Outcome
) -> None:
    found = outcome_of(llama({"rope_type": "default", "rope_theta": 1e4}), change=change)
    assert found[:2] == expected[:2]
