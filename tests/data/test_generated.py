"""A generated answer is split into reasoning, text and calls, under every template."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from data.dialogues.conversation import ToolCall, Turn
from data.encoding.generated import AnswerMarks, answer_marks, printed, without_closers
from data.encoding.templates import DEFAULT, plain_text, render_examples
from data.errors import BadRecord
from loop.adapters.printed_answer import AnswerPrinter, as_json
from tests.data.test_published_templates import CONTROL, FILES, TODAY
from tests.support.chat_templates import CASES, DIALOGUES, LOOKUP, ROME, gpt, tokenizer_with

TEMPLATES = {name: case.text for name, case in CASES.items()}
PUBLISHED = {
    name: TODAY.sub("'26 Jul 2024'", file.read_text(encoding="utf-8"))
    for name, file in FILES.items()
}
EACH = replace(DEFAULT, multi_turn="each")


def tokenizer_of(chat_tokenizer: Any, text: str) -> Any:
    changed = tokenizer_with(chat_tokenizer, text)
    names = sorted({*CONTROL.findall(text)})
    changed.add_special_tokens({"additional_special_tokens": names})
    return changed


def answers(tokenizer: Any) -> list[tuple[Turn, str]]:
    """Return each answer that the template can show as a turn, and its text without its end."""
    found = []
    for kind, dialogue in DIALOGUES.items():
        if kind in ("think_text", "quoted_control", "newline_answer"):
            continue
        turns = [turn for turn in dialogue.turns if turn.role == "assistant" and turn.supervised]
        try:
            items = render_examples(dialogue, "chat", tokenizer, EACH)
        except BadRecord:
            continue
        for turn, item in zip(turns, items, strict=True):
            (place,) = item.located
            found.append((turn, without_closers(item.text[place.start : place.end], tokenizer)))
    return found


def values(turn: Turn) -> tuple[str, str, list[tuple[str, Any]]]:
    """Return what a turn holds, but for the ids of its calls."""
    calls = [(call.name, call.arguments) for call in turn.calls]
    return (turn.reasoning or "", turn.text, calls)


@pytest.mark.parametrize("name", [*TEMPLATES, *PUBLISHED])
def test_an_answer_is_split_into_the_parts_that_the_template_was_given(
    name: str, chat_tokenizer: Any
) -> None:
    tokenizer = tokenizer_of(chat_tokenizer, (TEMPLATES | PUBLISHED)[name])
    marks, seen = answer_marks("chat", tokenizer, EACH), Counter[bool]()
    for turn, text in answers(tokenizer):
        found = marks.split(text, [LOOKUP])
        seen[values(found) == values(turn)] += 1
        if found.calls == () and turn.calls:  # Calls that do not parse stay text.
            assert "lookup" in found.text + (found.reasoning or "")
            assert "Rome" in found.text + (found.reasoning or "")
        elif not text.startswith("<|turn>"):  # Gemma writes a header after a tool's result.
            assert values(found) == values(turn), text
    assert seen[True] >= seen[False], seen


def test_most_calls_of_published_templates_are_parsed(chat_tokenizer: Any) -> None:
    seen = Counter[bool]()
    for text in PUBLISHED.values():
        tokenizer = tokenizer_of(chat_tokenizer, text)
        marks = answer_marks("chat", tokenizer, EACH)
        calling = [(turn, answer) for turn, answer in answers(tokenizer) if turn.calls]
        seen.update(values(marks.split(answer)) == values(turn) for turn, answer in calling)
    assert seen[True] > 8 * seen[False], seen
    assert seen[True] >= 60 or not PUBLISHED


MANY = gpt(
    "",
    reasoning="Two cities.",
    calls=(ROME, ToolCall("lookup", {"city": 'O\'Fallon "x"\n{}', "days": 2})),
)


PAIRS = [name for name in ("glm4moe", "qwen3_5_think") if name in PUBLISHED]


@pytest.mark.parametrize("name", ["bundled", "rewrites", "plain text", *PAIRS])
def test_several_calls_with_hostile_arguments_are_split(name: str, chat_tokenizer: Any) -> None:
    if name == "plain text":
        marks = answer_marks("vicuna", chat_tokenizer, DEFAULT)
        text = plain_text(MANY)[0]
    else:
        tokenizer = tokenizer_of(chat_tokenizer, (TEMPLATES | PUBLISHED)[name])
        marks = answer_marks("chat", tokenizer, DEFAULT)
        tools = (properties_of({"city": {"type": "string"}, "days": {"type": "integer"}}),)
        dialogue = replace(DIALOGUES["call"], tools=tools)
        dialogue = replace(dialogue, turns=(dialogue.turns[0], MANY))
        (item,) = render_examples(dialogue, "chat", tokenizer, EACH)
        text = without_closers(item.text[item.located[0].start :], tokenizer)
    tools = (properties_of({"city": {"type": "string"}, "days": {"type": "integer"}}),)
    assert values(marks.split(text, tools)) == values(MANY)


def properties_of(properties: dict[str, Any]) -> dict[str, Any]:
    function = LOOKUP["function"]
    parameters = {**function["parameters"], "properties": properties}
    return {**LOOKUP, "function": {**function, "parameters": parameters}}


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "lookup", "arguments": {"city": "Ro',
        '<tool_call>{"name": "lookup", "arguments": {"city": "Rome"}}</tool_call> and more',
        '<tool_call>{"name": "lookup", "arguments": [[[[',
        "<tool_call>",
        "</think> <think>",
    ],
)
def test_a_malformed_answer_stays_text(text: str, chat_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(chat_tokenizer, TEMPLATES["bundled"])
    marks = answer_marks("chat", tokenizer, DEFAULT)
    assert values(marks.split(text)) == ("", text, [])


def test_what_is_printed_while_an_answer_is_generated_is_never_taken_back(
    chat_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in TEMPLATES.values():
        tokenizer = tokenizer_of(chat_tokenizer, text)
        marks = answer_marks("chat", tokenizer, EACH)
        for turn, answer in answers(tokenizer):
            shown = printed(marks.split(answer))
            for end in range(len(answer)):
                early = printed(marks.split_unfinished(answer[:end]))
                assert shown.startswith(early), (answer[:end], turn)
            stream(marks, tokenizer, tokenizer(answer, add_special_tokens=False)["input_ids"])
            assert capsys.readouterr().out == f"{shown}\n"


def stream(marks: AnswerMarks, tokenizer: Any, ids: list[int]) -> None:
    import torch

    printer = AnswerPrinter(marks, tokenizer, ())
    printer.put(torch.tensor([[1, 2]]))
    for one in ids:
        printer.put(torch.tensor([one]))
    printer.end()


def test_reasoning_and_calls_are_lines_and_keys_of_their_own() -> None:
    answer = replace(MANY, text="Looking.")
    first, second, *calls = printed(answer).splitlines()
    assert (first, second) == ("reasoning: Two cities.", "Looking.")
    assert calls[0] == 'call: lookup({"city": "Rome"})'
    assert as_json(answer)["tool_calls"][0] == {"name": "lookup", "arguments": {"city": "Rome"}}
    assert as_json(gpt("Hi")) == {"answer": "Hi"}
