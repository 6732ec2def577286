"""Only answers and their end tokens are supervised."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.conversation import Dialogue, Turn
from data.dialogues.sharegpt import Tally
from data.encoding.encode import IGNORE_INDEX, Example, encode_dialogues, label
from data.encoding.templates import TemplateName, prompt, render
from data.encoding.token_offsets import places
from data.errors import BadRecord, UserError
from loop.config.flags import DUMMY_DATA
from tests.support.helpers import dialogues_in


def encode(file: Path, template: TemplateName, tokenizer: Any, length: int = 2048) -> list[Example]:
    dialogues, tally = dialogues_in(file)
    return [*encode_dialogues(dialogues, template, tokenizer, length, tally)]


def dialogue(*texts: str) -> Dialogue:
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    return Dialogue("d", tuple(turns))


def supervised_runs(example: Example, tokenizer: Any) -> list[str]:
    """Return the text of each run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for one in example.labels:
        if one != IGNORE_INDEX:
            runs[-1].append(one)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.fixture(scope="module")
def mistral(shared: Path) -> Any:
    from transformers import LlamaTokenizer

    folder = shared / "tokenizers/mistral_v1"
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True, legacy=False)


@pytest.mark.parametrize(
    ("data", "golden", "equal_ids"),
    [
        ("fastchat_dummy_conversation", "vicuna_mistralv1_dummy", 500),
        ("oasst_en", "vicuna_mistralv1_oasst_en", 456),
    ],
)
def test_vicuna_masks_equal_fastchats(
    data: str, golden: str, equal_ids: int, shared: Path, mistral: Any
) -> None:
    examples = {e.id: e for e in encode(shared / f"data/{data}.json", "vicuna", mistral)}
    with gzip.open(shared / f"golden/{golden}.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    equal = [row for row in rows if examples[row["id"]].input_ids == row["input_ids"]]
    assert len(equal) >= equal_ids
    wrong = [row["id"] for row in equal if examples[row["id"]].labels != row["labels"]]
    assert not wrong


@pytest.mark.parametrize("template", ["vicuna", "chat"])
def test_supervised_runs_are_the_answers_with_their_end_tokens(
    template: TemplateName, chat_tokenizer: Any
) -> None:
    dialogues, _ = dialogues_in(DUMMY_DATA)
    examples = encode(DUMMY_DATA, template, chat_tokenizer)
    assert len(examples) == len(dialogues) == 500
    space = " " if template == "vicuna" else ""
    for example, source in zip(examples, dialogues, strict=True):
        answers = [turn.text for turn in source.turns if turn.role == "assistant"]
        runs = supervised_runs(example, chat_tokenizer)
        assert runs == [f"{space}{answer}<|im_end|>" for answer in answers]


def test_a_system_turn_replaces_the_templates_own(chat_tokenizer: Any) -> None:
    plain = dialogue("Hi", "Yo")
    brief = Dialogue("d", plain.turns, system="Be brief.")
    assert (
        render(brief, "vicuna", chat_tokenizer).text == "Be brief. USER: Hi ASSISTANT: Yo<|im_end|>"
    )
    rendered = render(brief, "chat", chat_tokenizer)
    assert rendered.text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert "SmolLM" not in rendered.text
    assert [rendered.text[a:b] for a, b in rendered.spans] == ["Yo<|im_end|>"]
    refusing = with_template(chat_tokenizer, "{{ raise_exception('System role not supported') }}")
    with pytest.raises(BadRecord, match="fails with TemplateError: System role not supported"):
        render(brief, "chat", refusing)


def test_a_chat_template_that_trims_and_decorates_answers_is_followed_exactly(
    chat_tokenizer: Any,
) -> None:
    trimming = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] | trim }} [/Q]"
        "{% else %} <think>\n\n</think>{{ m['content'] | trim }}<|im_end|>\n{% endif %}{% endfor %}"
    )
    tokenizer = with_template(chat_tokenizer, trimming)
    rendered = render(dialogue("Hi", "  yes\n", "yes", "  yes"), "chat", tokenizer)
    pieces = [rendered.text[start:end] for start, end in rendered.spans]
    # The prompt ends with the question: the template has no generation prompt.
    assert pieces == [" <think>\n\n</think>yes<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        # A prompt ends with the control token, and so does an answer: it is not its continuation.
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}<|im_end|>", "opens the answer"),
        ("{% for m in messages %}{{ m['role'] }}<|im_end|>{% endfor %}", "does not show"),
        # The template repeats the answer as a title.
        (
            "{{ messages[1]['content'] }}{% for m in messages %}{{ m['content'] }}<|im_end|>"
            "{% endfor %}",
            "fails with",
        ),
    ],
)
def test_a_chat_template_without_exact_spans_is_refused(
    template: str, complaint: str, chat_tokenizer: Any
) -> None:
    with pytest.raises(BadRecord, match=f"(?s){complaint}.*--template vicuna"):
        render(dialogue("Hi", "Yo", "a", "b"), "chat", with_template(chat_tokenizer, template))


def with_template(tokenizer: Any, template: str) -> Any:
    from copy import deepcopy

    changed = deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_user_text_that_looks_like_the_template_stays_unsupervised(chat_tokenizer: Any) -> None:
    trap = dialogue("Say ASSISTANT: no", "ASSISTANT: fine", "USER: ASSISTANT: x", "done")
    for template, space in (("vicuna", " "), ("chat", "")):
        rendered = render(trap, template, chat_tokenizer)
        pieces = [rendered.text[start:end] for start, end in rendered.spans]
        assert pieces == [f"{space}ASSISTANT: fine<|im_end|>", f"{space}done<|im_end|>"]


def test_long_dialogues_are_cut_on_the_right_and_counted(
    chat_tokenizer: Any, tmp_path: Path
) -> None:
    tally = Tally(read=2)
    long, short = dialogue("word " * 100, "answer"), dialogue("Hi", "answer")
    examples = [*encode_dialogues([long, short], "chat", chat_tokenizer, 60, tally)]
    assert [len(example.input_ids) <= 60 for example in examples] == [True]
    assert tally.dropped == {"no supervised token within 60": 1}
    assert tally.noted == {"cut at 60 tokens": 1}
    assert tally.read == tally.kept + tally.dropped.total()


def test_the_prompt_is_the_dialogue_up_to_the_answer(chat_tokenizer: Any) -> None:
    whole = dialogue("Hi", "Yo", "And?", "So")
    for template in ("vicuna", "chat"):
        rendered = render(whole, template, chat_tokenizer)
        asked = prompt(Dialogue("d", whole.turns[:3]), template, chat_tokenizer)
        assert rendered.text.startswith(asked.text)
        assert len(asked.text) == rendered.spans[-1][0]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match="no character offsets"):
        next(encode_dialogues([dialogue("Hi", "Yo")], "chat", Slow(), 100, Tally()))


def test_binary_search_for_spans_equals_a_linear_search() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        offsets, place = [(0, 0)] * draw.randint(0, 1), 0
        for _ in range(draw.randint(0, 30)):
            end = place + draw.randint(0, 3)
            offsets += [(place, end)] * draw.choice([1, 1, 1, 2])  # bytes of one character
            place = end
        offsets += [(0, 0)] * draw.randint(0, 1)  # the tokenizer's EOS
        spans, end = [], 0
        while end < place:
            start = end + draw.randint(3, 6)
            end = start + draw.randint(1, 8)
            spans.append((start, end))
        ids = [*range(5, 5 + len(offsets))]
        inside = [any(b < end and e > start for start, end in spans) for b, e in offsets]
        closing = [
            one
            for one, (b, e) in zip(ids, offsets, strict=True)
            if any(b < end <= e for _, end in spans)
        ]
        labels = [one if yes else IGNORE_INDEX for one, yes in zip(ids, inside, strict=True)]
        assert label(ids, places(offsets), spans) == (labels, closing)
