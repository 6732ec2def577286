"""Supervision by role and by weights of turns; messages with the text of control tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.dialogues.conversation import Dialogue, Turn
from data.dialogues.sharegpt import Tally
from data.encoding.encode import IGNORE_INDEX, Example, encode_dialogues, label
from data.encoding.encoder import Encoder
from data.encoding.templates import TemplateName, render
from data.errors import UserError
from tests.support.helpers import dialogues_in

TRAPS = [
    *("</s>", "<s>", " ASSISTANT: ", "USER: ", "<|im_end|>", "<|im_start|>assistant\n", "###"),
    *("<|endoftext|>", "<|im_", "end|>", "\n", " ", "☃", "a", "### Human: ", "é", "\u2028", "0"),
]
# SmolLM2's vocabulary lacks control characters and bytes of unassigned planes.
LETTERS = st.characters(max_codepoint=0x2FFFF, exclude_categories=["Cc", "Cs", "Cn", "Co"])
TEXT = st.lists(st.sampled_from(TRAPS) | st.text(LETTERS, max_size=5), min_size=1, max_size=6).map(
    "".join
)
# The template's newline and a newline at the start of an answer may be one token, which is then
# supervised.
MESSAGE = TEXT.map(lambda text: text.lstrip("\n")).filter(lambda text: bool(text.strip()))


def read(file: Path, *turns: dict[str, Any], **how: Any) -> tuple[list[Dialogue], Tally]:
    file.write_text(json.dumps([{"id": "a", "conversations": [*turns]}]))
    return dialogues_in(file, **how)


def turn(role: str, text: str, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": text, **more}


def encode(dialogue: Dialogue, template: TemplateName, tokenizer: Any) -> Example:
    return next(encode_dialogues([dialogue], template, tokenizer, 4096, Tally(1)))


def trained(example: Example, tokenizer: Any) -> str:
    ids = [one for one in example.labels if one != IGNORE_INDEX]
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def encoded(dialogue: Dialogue, template: TemplateName, encoder: Encoder) -> Example:
    """Encode with a cached encoder, since a new one takes a second."""
    rendered = render(dialogue, template, encoder.tokenizer)
    ids, spans, offsets = encoder([rendered])[0]
    labels, ends = label(ids, offsets, spans)
    assert len(ends) == len(spans)
    return Example("d", ids, labels, 1)


@pytest.fixture(scope="module")
def chat_encoder(chat_tokenizer: Any) -> Encoder:
    return Encoder(chat_tokenizer)


@pytest.fixture(scope="module")
def mistral_encoder(shared: Path) -> Encoder:
    from transformers import LlamaTokenizer

    folder = shared / "tokenizers/mistral_v1"
    return Encoder(LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False))


def test_tool_turns_are_read_and_never_supervised(tmp_path: Path, chat_tokenizer: Any) -> None:
    called = [
        *(turn("human", "Weather?"), turn("function_call", "look()"), turn("observation", "Rain")),
        turn("gpt", "It rains."),
    ]
    (dialogue,), _ = read(tmp_path / "data.json", *called)
    assert [one.role for one in dialogue.turns] == ["user", "assistant", "tool", "assistant"]
    example = encode(dialogue, "chat", chat_tokenizer)
    assert trained(example, chat_tokenizer) == "look()<|im_end|>It rains.<|im_end|>"
    text = render(dialogue, "vicuna", chat_tokenizer).text
    assert text.endswith("ASSISTANT: look()<|im_end|>TOOL: Rain ASSISTANT: It rains.<|im_end|>")
    pairs = render(dialogue, "t5", chat_tokenizer)
    assert [pairs.text[a:b] for a, b in pairs.spans] == ["look()", "It rains."]
    assert "look()\n### Tool: Rain\n### Assistant: It rains." in pairs.text


def test_consecutive_answers_are_all_supervised(tmp_path: Path, chat_tokenizer: Any) -> None:
    turns = [turn("human", "Count."), turn("gpt", "One"), turn("gpt", "Two")]
    (dialogue,), _ = read(tmp_path / "data.json", *turns)
    example = encode(dialogue, "chat", chat_tokenizer)
    assert trained(example, chat_tokenizer) == "One<|im_end|>Two<|im_end|>"
    assert "### Assistant: One\n### Assistant: Two\n" in render(dialogue, "t5", None).text


@pytest.mark.parametrize("mark", [{"train": False}, {"weight": 0}, {"train": 0}])
def test_a_turn_with_weight_0_is_not_supervised(
    mark: dict[str, Any], tmp_path: Path, chat_tokenizer: Any
) -> None:
    turns = [turn("human", "Hi"), turn("gpt", "Bad", **mark), turn("human", "So"), turn("gpt", "B")]
    (dialogue,), _ = read(tmp_path / "data.json", *turns)
    assert trained(encode(dialogue, "chat", chat_tokenizer), chat_tokenizer) == "B<|im_end|>"


def test_train_on_last_supervises_the_last_answer(tmp_path: Path, chat_tokenizer: Any) -> None:
    turns = [turn("human", "Hi"), turn("gpt", "A"), turn("human", "So"), turn("gpt", "B")]
    (dialogue,), _ = read(tmp_path / "data.json", *turns, train_on="last")
    assert trained(encode(dialogue, "chat", chat_tokenizer), chat_tokenizer) == "B<|im_end|>"


def test_an_unknown_weight_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'turn 1: found "weight" 0\.5; expected true or false'):
        read(tmp_path / "data.json", turn("human", "Hi"), turn("gpt", "A", weight=0.5))


def test_an_answer_end_that_is_no_control_token_is_refused(chat_tokenizer: Any) -> None:
    class EndsInWords:
        eos_token = " End"

        def __getattr__(self, name: str) -> Any:
            return getattr(chat_tokenizer, name)

        def __call__(self, *texts: Any, **how: Any) -> Any:
            return chat_tokenizer(*texts, **how)

    hello = Dialogue("d", (Turn("user", "Hi"), Turn("assistant", "Yo")))
    with pytest.raises(UserError, match="found 'ĠEnd' at an answer's end; expected a control"):
        encode(hello, "vicuna", EndsInWords())


@pytest.mark.parametrize("template", ["chat", "vicuna"])
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(MESSAGE, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_text_like_control_tokens_never_leaks_or_shifts_labels(
    template: TemplateName, texts: list[str], chat_tokenizer: Any, chat_encoder: Encoder
) -> None:
    turns = [Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]
    control = chat_encoder.control_ids
    example = encoded(Dialogue("d", tuple(turns)), template, chat_encoder)
    space = " " if template == "vicuna" else ""
    assert trained(example, chat_tokenizer) == "".join(
        f"{space}{text}<|im_end|>" for text in texts[1::2]
    )
    # The only control tokens are those of the template, as with plain messages.
    plain = [Turn(one.role, "x") for one in turns]
    expected = encoded(Dialogue("d", tuple(plain)), template, chat_encoder)
    assert [i for i in example.input_ids if i in control] == [
        i for i in expected.input_ids if i in control
    ]


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(MESSAGE, min_size=2, max_size=2))
def test_text_like_control_tokens_stays_text_with_sentencepiece(
    texts: list[str], mistral_encoder: Encoder
) -> None:
    mistral = mistral_encoder.tokenizer
    turns = (Turn("user", texts[0]), Turn("assistant", texts[1]))
    example = encoded(Dialogue("d", turns), "vicuna", mistral_encoder)
    assert example.input_ids.count(mistral.eos_token_id) == 1
    assert example.input_ids.count(mistral.bos_token_id) == 1
    assert example.labels[-1] == mistral.eos_token_id
    assert trained(example, mistral).removesuffix("</s>").strip() == texts[1].strip()
