"""A T5 tokenizer with new tokens keeps every text; the ids of words do not change."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers

from data.encoding.templates import T5_SYSTEM
from data.encoding.tokenizer import CHARACTERS, with_fastchat_tokens, with_missing_characters
from loop.config.flags import DUMMY_DATA
from tests.support.helpers import dialogues_in
from tests.support.small_t5 import TOKENS, t5_tokenizer

CODE = [
    'def f(x):\n    """Doc."""\n\treturn {"a": [1, 2], "b": x ** 2}\n',
    '```json\n{\n  "key": "a\\\\b",\n\n  "list": [ 1,  2 ]\n}\n```',
    "if (a < b && c ^ d) { x = y; }\t// `x`",
    "<p class='a'>one</p>\n\n\n<br/>  C:\\dir\\file.txt  \n",
    "a{b}c<d>e\\f^g`h\ti\nj",
]


@pytest.fixture(scope="module", params=["small", "T5's own"])
def plain(request: pytest.FixtureRequest) -> Any:
    if request.param == "small":
        return t5_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "tokenizers/t5")


def round_trip(tokenizer: Any, text: str) -> str:
    decoded: str = tokenizer.decode(
        tokenizer(text)["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return decoded


@pytest.fixture(scope="module")
def reloaded(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer with new tokens, saved and loaded."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    with_missing_characters(plain)[0].save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", CODE)
def test_code_is_unchanged_after_saving_encoding_and_decoding(
    text: str, plain: Any, reloaded: Any
) -> None:
    if len(plain) > TOKENS:  # the small vocabulary lacks some letters
        assert round_trip(reloaded, text) == text
        assert round_trip(plain, text) != text
    known = "".join(c for c in text if c in CHARACTERS or c == " ")
    assert round_trip(reloaded, f"a{known}a") == f"a{known}a"


def test_new_tokens_do_not_change_the_ids_of_words(plain: Any, reloaded: Any) -> None:
    dialogues, _ = dialogues_in(DUMMY_DATA)
    texts = [" ".join(turn.text.split()) for d in dialogues for turn in d.turns]
    texts = [text for text in texts if not {*text} & {*CHARACTERS}]
    assert len(texts) > 900
    assert plain(texts)["input_ids"] == reloaded(texts)["input_ids"]


def test_each_character_becomes_one_token_and_none_twice(plain: Any, reloaded: Any) -> None:
    assert len(reloaded) == len(plain) + len(CHARACTERS)
    new = [reloaded.convert_tokens_to_ids(character) for character in CHARACTERS]
    assert new == [*range(len(plain), len(reloaded))]
    assert with_missing_characters(reloaded)[1] == []


def test_a_tokenizer_that_lacks_no_character_is_unchanged(chat_tokenizer: Any) -> None:
    assert with_missing_characters(chat_tokenizer) == (chat_tokenizer, [])


def test_normalizers_that_merge_spaces_are_left_out() -> None:
    one_space = normalizers.Replace(Regex(" {2,}"), "▁")
    for given in (one_space, normalizers.Sequence([normalizers.NFKC(), one_space])):
        tokenizer = t5_tokenizer()
        tokenizer.backend_tokenizer.normalizer = given
        made, _ = with_missing_characters(tokenizer)
        assert round_trip(made, "a  {   a") == "a  {   a"
        wide = round_trip(made, "ａ")
        assert wide == ("a" if isinstance(given, normalizers.Sequence) else wide)


def test_fastchats_tokens_have_fastchats_order(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer, new = with_fastchat_tokens(AutoTokenizer.from_pretrained(shared / "tokenizers/t5"))
    assert new == [*range(32100, 32110)]
    assert tokenizer.convert_ids_to_tokens(new) == ["[PAD]", *"<{\n}` \\^\t"]
    assert tokenizer.pad_token_id == 32100
    # The token for the space doubles the number of ids of a text.
    assert len(tokenizer(T5_SYSTEM)["input_ids"]) > 45


def test_every_ascii_character_survives_and_white_space_is_never_unknown(
    plain: Any, reloaded: Any
) -> None:
    if len(plain) > TOKENS:
        signs = map(chr, range(33, 127))
        assert not [c for c in signs if round_trip(reloaded, f"a {c} b") != f"a {c} b"]
    windows = "a\r\na\xa0a\u3000\ta\x0ca\ra"
    assert round_trip(reloaded, windows) == "a\na a \ta a a"
    assert reloaded.unk_token_id not in reloaded(windows)["input_ids"]
