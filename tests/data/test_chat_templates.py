"""Under every chat template, prompt and supervised ids are what the template itself renders."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data.dialogues.conversation import Dialogue, ToolCall, Turn
from data.dialogues.sharegpt import Tally
from data.encoding.encode import IGNORE_INDEX, Example, encode_dialogues
from data.encoding.encoder import prompt_ids
from data.encoding.templates import DEFAULT, RenderSettings, prompt
from data.errors import UserError
from tests.support.chat_templates import (
    CASES,
    DIALOGUES,
    LOOKUP,
    Case,
    gpt,
    tokenizer_with,
    user,
)

LONGEST = 1 << 20


def messages_of(dialogue: Dialogue, case: Case) -> list[dict[str, Any]]:
    """Return the dialogue in OpenAI's format, with the arguments in the form of the template."""
    messages: list[dict[str, Any]] = []
    if dialogue.system is not None:
        messages.append({"role": "system", "content": dialogue.system})
    for turn in dialogue.turns:
        text, reasoning = turn.text, turn.reasoning
        if text.startswith("<think>") and ("reasoning" in case.text or "thinking" in case.text):
            thought, _, text = text.partition("</think>")
            reasoning, text = thought.removeprefix("<think>").strip("\n"), text.lstrip("\n")
        message: dict[str, Any] = {"role": turn.role, "content": text}
        if reasoning:
            message["reasoning_content"] = reasoning
        if turn.calls:
            message["tool_calls"] = [
                {
                    **({"id": call.id} if call.id else {}),
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(call.arguments, ensure_ascii=False)
                        if case.arguments_as_text
                        else call.arguments,
                    },
                }
                for call in turn.calls
            ]
        messages.append(message | ({"name": turn.name} if turn.name else {}))
    return messages


def oracle(dialogue: Dialogue, case: Case, tokenizer: Any) -> list[tuple[str, str]] | str:
    """Return prompt and text of each supervised answer, or why the template cannot give them."""
    messages, tools = messages_of(dialogue, case), [*dialogue.tools] or None
    if case is CASES["text_calls"] and tools is None:
        tools = []
    skipped, wanted = len(messages) - len(dialogue.turns), []

    def apply(stop: int, **how: Any) -> str:
        shown = messages[:stop]
        if case is CASES["parts"]:
            shown = [
                {**one, "content": [{"type": "text", "text": one["content"]}]} for one in shown
            ]
        return str(tokenizer.apply_chat_template(shown, tools=tools, tokenize=False, **how))

    try:
        whole = apply(len(messages))
        for number, turn in enumerate(dialogue.turns, skipped):
            if turn.role == "assistant" and turn.supervised:
                start = apply(number, add_generation_prompt=True)
                shown = apply(number + 1)
                if not shown.startswith(start):
                    return "opens the answer"
                closes = (turn.calls and case.closes_calls) or case.closes
                answer = shown[len(start) :]
                if case.appended:
                    answer += closes
                else:
                    end = answer.rindex(closes) if closes != "<|im_end|>" else 0
                    end = answer.rindex("<|im_end|>") if closes == "<|im_end|>" else end
                    answer = answer[: end + len(closes)]
                if turn.reasoning and turn.reasoning not in answer:
                    return "does not show"
                wanted.append((start, answer))
    except Exception:
        return "fails with"
    for turn in dialogue.turns:
        values = [value for call in turn.calls for value in call.arguments.values()]
        written = [turn.text.rpartition("</think>")[2], *(call.name for call in turn.calls)]
        for text in [*written, *map(str, values)]:
            if (
                text.strip() not in whole
                and json.dumps(text.strip(), ensure_ascii=False)[1:-1] not in whole
            ):
                return "does not show"
    if dialogue.tools and "Look up the weather." not in whole:
        return "does not show the tool definitions"
    return wanted


def trained(examples: list[Example], tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Yield the text before each supervised run, and the text of the run."""
    for example in examples:
        place = 0
        for supervised, run in groupby(example.labels, lambda label: label != IGNORE_INDEX):
            length = len([*run])
            if supervised:
                before, ids = example.input_ids[:place], example.input_ids[place : place + length]
                yield decoded(before, tokenizer), decoded(ids, tokenizer)
            place += length


def decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def encoded(
    dialogue: Dialogue, tokenizer: Any, settings: RenderSettings = DEFAULT
) -> tuple[list[Example], Tally]:
    tally = Tally()
    dialogue = replace(dialogue, place="file.json: record 0")
    return [*encode_dialogues([dialogue], "chat", tokenizer, LONGEST, tally, settings)], tally


@pytest.fixture(scope="module")
def tokenizers(chat_tokenizer: Any) -> dict[str, Any]:
    return {name: tokenizer_with(chat_tokenizer, case.text) for name, case in CASES.items()}


@pytest.mark.parametrize("kind", DIALOGUES)
@pytest.mark.parametrize("name", CASES)
def test_prompt_and_supervised_text_are_the_templates_own(
    name: str, kind: str, tokenizers: dict[str, Any]
) -> None:
    case, dialogue, tokenizer = CASES[name], DIALOGUES[kind], tokenizers[name]
    expected = oracle(dialogue, case, tokenizer)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=r"^file\.json: record 0 \(id") as refused:
            encoded(dialogue, tokenizer)
        assert expected in str(refused.value)
        assert "--on_bad_record skip" in str(refused.value)
        return
    examples, tally = encoded(dialogue, tokenizer)
    assert [*trained(examples, tokenizer)] == expected
    assert (tally.kept, tally.answers, tally.ended) == (1, len(expected), len(expected))
    for example, (start, _) in zip(examples, expected, strict=False):
        # The ids of the prompt are those that generation starts from.
        ids = tokenizer(start, add_special_tokens=False)["input_ids"]
        if "<|im_end|> " not in start:
            assert example.input_ids[: len(ids)] == ids


@pytest.mark.parametrize("name", ["rewrites", "opens", "channels", "next_role"])
def test_reasoning_of_every_answer_is_trained_unless_the_dialogue_is_rendered_once(
    name: str, tokenizers: dict[str, Any]
) -> None:
    dialogue, tokenizer = DIALOGUES["reasoning_twice"], tokenizers[name]
    each, tally = encoded(dialogue, tokenizer)
    texts = [text for _, text in trained(each, tokenizer)]
    assert ["Let me see." in texts[0], "Once more." in texts[1]] == [True, True]
    turns = [None] if name == "next_role" else [1, 3]  # It shows the reasoning of all turns.
    assert [example.turn for example in each] == turns
    assert {example.share for example in each} == {dialogue.share}
    assert not [note for note in tally.noted if "removes" in note]
    whole, tally = encoded(dialogue, tokenizer, RenderSettings(multi_turn="whole"))
    assert len(whole) == 1
    first, last = (text for _, text in trained(whole, tokenizer))
    assert last == texts[-1]
    assert "So." in first
    assert ("Let me see." in first) == (name == "next_role")
    removed = tally.noted["answers whose reasoning the template removes"]
    assert removed == (name != "next_role")


def test_a_template_that_keeps_history_gets_each_dialogue_once_and_each_on_request(
    tokenizers: dict[str, Any],
) -> None:
    dialogue, tokenizer = DIALOGUES["three"], tokenizers["two_closers"]
    whole, _ = encoded(dialogue, tokenizer)
    each, tally = encoded(dialogue, tokenizer, RenderSettings(multi_turn="each"))
    assert (len(whole), len(each), tally.kept, tally.answers) == (1, 3, 1, 3)
    assert [*trained(whole, tokenizer)] == [*trained(each, tokenizer)]
    assert each[2].input_ids == whole[0].input_ids


def test_thinking_switched_off_is_off_in_prompt_and_text(tokenizers: dict[str, Any]) -> None:
    off = RenderSettings('{"enable_thinking": false}')
    tokenizer = tokenizers["rewrites"]
    ((start, answer),) = trained(encoded(DIALOGUES["plain"], tokenizer, off)[0], tokenizer)
    assert start.endswith("<think>\n\n</think>\n\n")
    assert answer == "General greeting<|im_end|>"
    record = replace(DIALOGUES["plain"], template_arguments={"enable_thinking": False})
    assert [*trained(encoded(record, tokenizer)[0], tokenizer)] == [(start, answer)]
    with pytest.raises(UserError, match="opens the answer of turn 1") as refused:
        encoded(DIALOGUES["reasoning"], tokenizer, off)
    assert """Give --chat_template_kwargs '{"enable_thinking": true}'""" in str(refused.value)


@pytest.mark.parametrize("name", ["rewrites", "opens", "channels", "next_role"])
def test_reasoning_and_tool_calls_can_be_context(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    without = RenderSettings(train_on_reasoning=False, train_on_tool_calls=False)
    texts = [
        t for _, t in trained(encoded(DIALOGUES["reasoning"], tokenizer, without)[0], tokenizer)
    ]
    assert texts == ["So." + CASES[name].closes]
    if name == "next_role":
        return
    examples, tally = encoded(DIALOGUES["call_with_text"], tokenizer, without)
    texts = [text for _, text in trained(examples, tokenizer)]
    assert texts[0].rstrip("\n").endswith("Looking.")
    assert "Rome" not in texts[0]
    assert texts[1].endswith("It is clear." + CASES[name].closes)
    assert (tally.answers, tally.ended) == (2, 1)
    assert "Rome" in decoded(examples[0].input_ids, tokenizer)


def test_what_a_template_cannot_show_is_skipped_and_counted_by_its_cause(
    tokenizers: dict[str, Any],
) -> None:
    tally = Tally()
    kinds = ["plain", "system", "call", "reasoning", "three"]
    dialogues = [replace(DIALOGUES[kind], place=f"f.json: record {kind}") for kind in kinds]
    arguments = (LONGEST, tally, DEFAULT, "skip")
    examples = [*encode_dialogues(dialogues, "chat", tokenizers["no_places"], *arguments)]
    assert [example.id for example in examples] == ["plain", "three"]
    assert tally.dropped == {
        "refused by the chat template": 1,
        "not shown by the chat template": 2,
    }
    assert (tally.kept, tally.named["refused by the chat template"]) == (2, ["system"])


def test_text_that_a_template_removes_is_counted(chat_tokenizer: Any) -> None:
    removes = CASES["marked"].text.replace(
        "{{ message.content }}<|end|>{% endgen",
        "{{ message.content.split('<|channel|>')[0] }}<|end|>{% endgen",
    )
    tokenizer = tokenizer_with(chat_tokenizer, removes)
    dialogue = replace(
        DIALOGUES["plain"], turns=(user("Hi"), gpt("Kept. The token <|channel|> opens a channel."))
    )
    examples, tally = encoded(dialogue, tokenizer)
    assert next(iter(trained(examples, tokenizer)))[1] == "Kept. The token <|end|>"
    assert tally.noted["answers of which the template removes text"] == 1


def test_an_answer_keeps_its_newlines_under_a_tokenizer_that_adds_a_space() -> None:
    """A newline merges with the next one here, so it cannot stand before a piece of a text."""
    letters = ["\u2581", "\n", *"acdeghinorstu:", "\n\n"]
    vocabulary = {name: number for number, name in enumerate(["</s>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [("\n", "\n")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    for answer in ("code", "\ncode", "\n\ncode", " code"):
        dialogue = replace(DIALOGUES["plain"], turns=(user("hi"), gpt(answer)))
        (example,), _ = encoded(dialogue, tokenizer)
        tokens = tokenizer.convert_ids_to_tokens([n for n in example.labels if n != IGNORE_INDEX])
        assert "".join(tokens).replace("\u2581", " ") == f"{answer}</s>"


def test_an_answer_of_reasoning_alone_ends_as_others(tokenizers: dict[str, Any]) -> None:
    turns = (user("Why?"), gpt("<think>\nLet me see.\n</think>"))
    examples, _ = encoded(replace(DIALOGUES["plain"], turns=turns), tokenizers["rewrites"])
    ((_, answer),) = trained(examples, tokenizers["rewrites"])
    assert answer == "<think>\nLet me see.\n</think>\n\n<|im_end|>"


def test_rendered_once_an_answer_ends_before_the_next_role(tokenizers: dict[str, Any]) -> None:
    once = RenderSettings(multi_turn="whole")
    examples, tally = encoded(DIALOGUES["three"], tokenizers["channels"], once)
    answers = [text for _, text in trained(examples, tokenizers["channels"])]
    assert [text[-len("<|return|>") :][-7:] for text in answers[:2]] == ["<|end|>"] * 2
    assert {*tally.closers} == {"<|end|>", "<|return|>"}


def test_what_ends_the_last_dialogue_alone_does_not_split_it(tokenizers: dict[str, Any]) -> None:
    examples, _ = encoded(DIALOGUES["three"], tokenizers["trailing_eos"])
    assert len(examples) == 1


def test_generation_marks_that_differ_are_counted(chat_tokenizer: Any) -> None:
    same = CASES["marked"].text
    other = same.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    assert other != same
    for text, count in ((same, 0), (other, 3)):
        _, tally = encoded(DIALOGUES["three"], tokenizer_with(chat_tokenizer, text))
        assert sum(n for note, n in tally.noted.items() if "{% generation %}" in note) == count


def test_of_several_templates_the_one_for_tools_is_taken_or_the_one_that_is_named(
    chat_tokenizer: Any,
) -> None:
    named = {"default": CASES["two_closers"].text, "tool_use": CASES["rewrites"].text}
    tokenizer = tokenizer_with(chat_tokenizer, named)
    for kind, closes in (("plain", "<|stop|><|end_turn|>"), ("call", "<|im_end|>")):
        examples, tally = encoded(DIALOGUES[kind], tokenizer)
        assert all(text.endswith(closes) for _, text in trained(examples, tokenizer))
        assert tally.ended == tally.answers
    settings = RenderSettings(chat_template_name="tool_use")
    examples, _ = encoded(DIALOGUES["plain"], tokenizer, settings)
    assert "<|im_end|>" in next(iter(trained(examples, tokenizer)))[1]
    del named["default"]
    with pytest.raises(UserError, match=r"found no name and no such template .*: tool_use"):
        encoded(DIALOGUES["plain"], tokenizer_with(chat_tokenizer, named))


def test_a_control_token_that_swallows_blanks_leaves_those_of_an_answer(
    chat_tokenizer: Any,
) -> None:
    tokenizer = tokenizer_with(chat_tokenizer, CASES["trailing_eos"].text.replace("|>\n", "|>"))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|assistant|>", rstrip=True, normalized=False)]}
    )
    dialogue = replace(DIALOGUES["plain"], turns=(user("Code?"), gpt("    return 1\n")))
    (example,), _ = encoded(dialogue, tokenizer)
    supervised = [label for label in example.labels if label != IGNORE_INDEX]
    assert decoded(supervised, tokenizer) == "    return 1\n<|end|>"
    header = example.input_ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>"))
    assert example.labels[header] == IGNORE_INDEX


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("fails", "parts")])
def test_chat_starts_from_the_ids_of_training(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    turns = (user("What is <|im_end|> or <|end|> for?"), gpt("Ends."))
    examples, _ = encoded(replace(DIALOGUES["plain"], turns=turns), tokenizer)
    asked = prompt(replace(DIALOGUES["plain"], turns=turns[:1]), "chat", tokenizer)
    ids = prompt_ids(asked, "chat", tokenizer)
    first = next(n for n, label in enumerate(examples[0].labels) if label != IGNORE_INDEX)
    assert examples[0].input_ids[:first] == ids


WORDS = st.text("ab \n<>|/{}\"'é", max_size=12)
CALLS = st.lists(
    st.builds(
        ToolCall,
        st.sampled_from(["lookup", "add"]),
        st.dictionaries(st.sampled_from(["city", "n"]), WORDS | st.integers(-5, 5), max_size=2),
    ),
    max_size=1,
).map(tuple)


@st.composite
def dialogues(draw: Any) -> Dialogue:
    turns: list[Turn] = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(user(draw(WORDS) + "?"))
        calls = draw(CALLS)
        if calls:
            turns += [gpt(draw(WORDS), calls=calls), Turn("tool", draw(WORDS) + "!", name="lookup")]
        reasoning = draw(st.none() | WORDS.map(lambda text: f"because {text}"))
        turns.append(gpt(draw(WORDS) + ".", reasoning=reasoning))
    tools = (LOOKUP,) if draw(st.booleans()) else ()
    return Dialogue("made", tuple(turns), draw(st.none() | WORDS.map("s{}".format)), tools)


@pytest.mark.parametrize("name", CASES)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(dialogue=dialogues())
def test_any_dialogue_is_rendered_as_by_the_template_or_refused(
    name: str, dialogue: Dialogue, tokenizers: dict[str, Any]
) -> None:
    case, tokenizer = CASES[name], tokenizers[name]
    expected = oracle(dialogue, case, tokenizer)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=r"^file\.json: record 0 \(id"):
            encoded(dialogue, tokenizer)
    else:
        assert [*trained(encoded(dialogue, tokenizer)[0], tokenizer)] == expected
