"""Decoded supervised tokens equal the answers, with four real tokenizers."""

import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import Tally
from data.encoding.encode import IGNORE_INDEX, Example, encode_dialogues
from data.encoding.seq2seq import SHORT, PairLimits, encode_pairs
from data.encoding.templates import TemplateName
from data.encoding.tokenizer import CHARACTERS, with_missing_characters
from loop.config.flags import DUMMY_DATA
from tests.conftest import SHARED
from tests.support.helpers import dialogues_in
from tests.support.real_tokenizers import llama3_tokenizer

UNCUT = 1 << 20  # tokens
# Real dialogues if available, with Markdown, code, emoji and other scripts.
REAL = SHARED / "data" / "oasst_en.json"
DIALOGUES = REAL if REAL.is_file() else DUMMY_DATA


@pytest.fixture(scope="module")
def dialogues() -> list[Dialogue]:
    return dialogues_in(DIALOGUES)[0]


@pytest.fixture(scope="module")
def llama3(request: pytest.FixtureRequest) -> Any:
    cache: Any = request.config.cache
    return llama3_tokenizer(cache.mkdir("llama3"))


@pytest.fixture(scope="module")
def mistral(shared: Path) -> Any:
    from transformers import LlamaTokenizer

    folder = shared / "tokenizers/mistral_v1"
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)


@pytest.fixture(scope="module")
def t5(shared: Path) -> Any:
    from transformers import AutoTokenizer

    return with_missing_characters(AutoTokenizer.from_pretrained(shared / "tokenizers/t5"))[0]


def decoded(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text


def runs(example: Example) -> list[list[int]]:
    """Return each run of supervised ids."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    assert all(label in (IGNORE_INDEX, one) for one, label in pairs)
    groups = groupby(example.labels, key=lambda label: label != IGNORE_INDEX)
    return [[*run] for supervised, run in groups if supervised]


def answers(dialogue: Dialogue) -> list[str]:
    return [turn.text for turn in dialogue.turns if turn.role == "assistant"]


def vicuna(text: str) -> str:
    return f" {text}"


def as_written(text: str) -> str:
    return text


@pytest.mark.parametrize(
    ("name", "template", "shown"),
    [
        ("chat_tokenizer", "chat", as_written),
        ("chat_tokenizer", "vicuna", vicuna),
        # The decoder removes the first space of a text, here the template's space.
        ("mistral", "vicuna", as_written),
        # Llama 3's template strips messages.
        pytest.param("llama3", "chat", str.strip, marks=pytest.mark.slow),
        pytest.param("llama3", "vicuna", vicuna, marks=pytest.mark.slow),
    ],
)
def test_supervised_ids_decode_to_every_answer_and_its_end(
    name: str,
    template: TemplateName,
    shown: Callable[[str], str],
    dialogues: list[Dialogue],
    request: pytest.FixtureRequest,
) -> None:
    tokenizer, tally = request.getfixturevalue(name), Tally(len(dialogues))
    examples = {e.record: e for e in encode_dialogues(dialogues, template, tokenizer, UNCUT, tally)}
    expected = sum(map(len, map(answers, dialogues)))
    assert tally.answers == tally.ended == expected
    for number, dialogue in enumerate(dialogues):
        written = [shown(text) + tokenizer.eos_token for text in answers(dialogue)]
        found = runs(examples[number]) if number in examples else []
        assert [decoded(tokenizer, run) for run in found] == written, dialogue.id


def test_t5_targets_decode_to_every_normalised_answer(t5: Any, dialogues: list[Dialogue]) -> None:
    tally = Tally(len(dialogues))
    limits = PairLimits(UNCUT, UNCUT, keep_header=False)
    pairs = [*encode_pairs(dialogues, t5, limits, False, tally)]
    of_each = {n: [*group] for n, group in groupby(pairs, key=lambda pair: pair.record)}
    assert len(pairs) + tally.noted[SHORT] == sum(map(len, map(answers, dialogues)))
    whole = 0
    for number, dialogue in enumerate(dialogues):
        written = [normalised(text, t5) for text in answers(dialogue)]
        for pair in of_each.get(number, []):
            found = decoded(t5, pair.labels)
            assert found.endswith("</s>")
            text = next((one for one in written if same(found[:-4], one, t5)), None)
            assert text is not None, (dialogue.id, found)
            del written[: written.index(text) + 1]  # in order; short pairs are dropped
            whole += "<unk>" not in found
    assert whole > 0.95 * len(pairs)


def normalised(text: str, tokenizer: Any) -> str:
    """Return the text after T5's normaliser (NFKC and others).

    The added tokens are split off before and stay unchanged.
    """
    write = tokenizer.backend_tokenizer.normalizer.normalize_str
    return re.sub(f"[^{re.escape(CHARACTERS)}]+", lambda piece: write(piece.group()), text)


def same(found: str, written: str, tokenizer: Any) -> bool:
    """Return whether two texts are equal, with <unk> for characters without a piece in T5."""
    pattern = "(.+?)".join(map(re.escape, found.split("<unk>")))
    match = re.fullmatch(pattern, written, re.DOTALL)
    unknown = tokenizer.unk_token_id
    return match is not None and all(
        tokenizer(f"a{character}", add_special_tokens=False)["input_ids"][-1] == unknown
        for gap in match.groups()
        for character in gap
    )
