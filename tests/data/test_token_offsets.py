"""Places by bytes give the same ids and labels as offsets, or are not used."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dialogues.conversation import Dialogue, Turn
from data.encoding.encode import label
from data.encoding.encoder import Encoder
from data.encoding.templates import Rendered, TemplateName, render
from data.encoding.token_offsets import Tiles
from tests.data.test_roles import TRAPS
from tests.support.helpers import dialogues_in

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TEXT = st.lists(st.sampled_from([*TRAPS, "\u2581", "▁▁x", "e\u0301"]) | ANY, min_size=1, max_size=8)
KINDS = [("chat", "chat"), ("chat", "vicuna"), ("mistral", "vicuna"), ("composed", "chat")]


@pytest.fixture(scope="module")
def encoders(shared: Path, chat_tokenizer: Any) -> dict[str, Encoder]:
    """Three encoders: byte-level, SentencePiece with BOS, and one with NFC normalisation."""
    from tokenizers import normalizers
    from transformers import LlamaTokenizer

    folder = shared / "tokenizers/mistral_v1"
    mistral = LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)
    composed = copy.deepcopy(chat_tokenizer)
    composed.backend_tokenizer.normalizer = normalizers.NFC()
    return {
        "chat": Encoder(chat_tokenizer),
        "mistral": Encoder(mistral),
        "composed": Encoder(composed),
    }


def by_offsets(encoder: Encoder, items: list[Rendered]) -> list[Any]:
    return [*encoder._encoded(encoder.tokenizer, items)]


def ids_and_labels(found: Any) -> Any:
    ids, spans, placed = found
    return ids, label(ids, placed, spans)


@pytest.mark.parametrize(("name", "template"), KINDS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT.map("".join), min_size=1, max_size=4))
def test_any_text_has_the_ids_and_labels_that_offsets_give(
    name: str, template: TemplateName, texts: list[str], encoders: dict[str, Encoder]
) -> None:
    encoder = encoders[name]
    turns = [Turn("assistant" if n % 2 else "user", f"{text}.") for n, text in enumerate(texts)]
    turns += [Turn("assistant", "So.")] * (len(turns) % 2)
    item = render(Dialogue("d", tuple(turns)), template, encoder.tokenizer)
    (found,) = encoder._without_offsets([item])
    (expected,) = by_offsets(encoder, [item])
    assert ids_and_labels(found) == ids_and_labels(expected)
    encoder.tiles.usable = True  # type: ignore[union-attr] # one such text does not disable them


@pytest.mark.parametrize(("name", "template"), KINDS)
def test_real_dialogues_are_encoded_without_offsets(
    name: str, template: TemplateName, encoders: dict[str, Encoder], shared: Path
) -> None:
    encoder = encoders[name]
    dialogues, _ = dialogues_in(shared / "data/oasst_en.json")
    items = [render(one, template, encoder.tokenizer) for one in dialogues[:200]]
    found = [*encoder._without_offsets(items)]
    assert encoder.tiles is not None
    tiled = encoder.tiles.encode(items, False)
    assert sum(one is None for one in tiled) <= 2
    for quick, slow in zip(found, by_offsets(encoder, items), strict=True):
        assert ids_and_labels(quick) == ids_and_labels(slow)


def test_a_tokenizer_that_does_more_than_its_backend_uses_offsets(
    encoders: dict[str, Encoder], chat_tokenizer: Any
) -> None:
    class Lowers:
        def __getattr__(self, name: str) -> Any:
            return getattr(chat_tokenizer, name)

        def __call__(self, texts: Any, **how: Any) -> Any:
            given = texts.lower() if isinstance(texts, str) else [one.lower() for one in texts]
            return chat_tokenizer(given, **how)

    encoder = Encoder(Lowers())
    dialogue = Dialogue("d", (Turn("user", "Hi THERE"), Turn("assistant", "YO")))
    item = render(dialogue, "vicuna", chat_tokenizer)
    assert [*encoder._without_offsets([item, item])] == by_offsets(encoder, [item, item])
    assert [*encoder._without_offsets([item])] == by_offsets(encoder, [item])


def test_places_by_bytes_are_disabled_if_they_fail_for_most_texts(
    encoders: dict[str, Encoder],
) -> None:
    tiles = Tiles(encoders["composed"].tokenizer)
    plain, odd = (Rendered(text, ((0, 2),), False) for text in ("e e", "e\u0301 e\u0301"))
    assert tiles.encode([plain, odd], False)[1] is None
    assert tiles.usable
    assert tiles.encode([odd], False) == [None]
    assert not tiles.usable
