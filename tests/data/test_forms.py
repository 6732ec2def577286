"""Each form of records gives the same dialogue; what the forms mark is never lost in silence."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.dialogues.conversation import Dialogue
from data.dialogues.forms import DEFAULT_READING, Reading, read_form
from data.dialogues.sharegpt import Tally, dialogues_of
from data.dialogues.turns import ALL_MARKS, SYSTEM_KEYS
from data.errors import UserError
from data.preparation import convert
from loop.doctor import show
from tests.support.helpers import dialogues_in

Q, A, Q2, A2, SYSTEM = "Which moon?", "Ganymede.", "And next?", "Titan.", "You keep a lighthouse."
ONE = [("user", Q), ("assistant", A)]
TWO = [*ONE, ("user", Q2), ("assistant", A2)]
TOOL = {"name": "tide", "description": "Tide.", "parameters": {"type": "object"}}
OPENAI = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
CHATML = f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n"
ASKED = {"messages": OPENAI}

FORMS: dict[str, tuple[Any, list[tuple[str, str]], str]] = {
    "prompt and completion": ({"prompt": Q, "completion": A}, ONE, "completion"),
    "TRL's messages": ({"prompt": OPENAI[:1], "completion": OPENAI[1:]}, ONE, "completion"),
    "ChatGLM": ({"prompt": Q2, "response": A2, "history": [[Q, A]]}, TWO, "response"),
    "ms-swift": ({"query": Q2, "response": A2, "history": [[Q, A]]}, TWO, "response"),
    "messages as history": ({"prompt": Q2, "response": A2, "history": OPENAI}, TWO, "response"),
    "question and answer": ({"question": Q, "answer": A}, ONE, "answer"),
    "one of answers": ({"question": Q, "answers": [A]}, ONE, "answers"),
    "OpenOrca": ({"question": Q, "response": A}, ONE, "response"),
    "dolly": ({"instruction": Q, "context": "", "response": A}, ONE, "response"),
    "input and output": ({"input": Q, "output": A}, ONE, "output"),
    "seed task": ({"instruction": Q, "instances": [{"input": "", "output": A}]}, ONE, "instances"),
    "Firefly": (
        {"conversation": [{"human": Q, "assistant": A}, {"human": Q2, "assistant": A2}]},
        TWO,
        "conversation",
    ),
    "xtuner": ({"conversation": [{"input": Q, "output": A}]}, ONE, "conversation"),
    "UltraChat": ({"data": [Q, A, Q2, A2]}, TWO, "data"),
    "dialog": ({"dialog": OPENAI}, ONE, "dialog"),
    "any key": ({"thread_of": OPENAI}, ONE, "thread_of"),
    "JSON in a column": ({"turns": json.dumps(OPENAI)}, ONE, "turns"),
    "items": ({"items": [{"from": "Human", "text": Q}, {"from": "BOT", "text": A}]}, ONE, "items"),
    "speaker": ({"turns": [{"speaker": "user", "text": Q}, {"speaker": "AI", "text": A}]}, ONE,
                "turns"),
    "ChatML": ({"text": CHATML}, ONE, "text"),
    "Guanaco": ({"text": f"### Human: {Q}### Assistant: {A}"}, ONE, "text"),
    "Gemini": (
        {"contents": [{"role": "user", "parts": [{"text": Q}]},
                      {"role": "model", "parts": [{"text": A}]}]},
        ONE,
        "contents",
    ),
    "OpenAI batch": (
        {"custom_id": "7", "body": {"messages": OPENAI[:1]},
         "response": {"body": {"choices": [{"message": OPENAI[1]}]}}},
        ONE,
        "body",
    ),
}  # fmt: skip


def read(record: Any, how: Reading = DEFAULT_READING) -> Dialogue:
    (dialogue,) = dialogues_of([(record, "f.json: record 0")], Tally(), how=how)
    return dialogue


def said(dialogue: Dialogue) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in dialogue.turns]


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_its_turns_and_the_account_names_the_deciding_key(name: str) -> None:
    record, turns, key = FORMS[name]
    tally = Tally()
    (dialogue,) = dialogues_of([(record, "f.json: record 0")], tally)
    assert said(dialogue) == turns
    assert f'by "{key}"' in str(tally)


def test_a_list_of_messages_is_a_record() -> None:
    assert said(read(OPENAI)) == ONE


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("key", SYSTEM_KEYS)
def test_a_system_text_is_read_under_each_name_in_each_form(name: str, key: str) -> None:
    record, turns, _ = FORMS[name]
    holder = {**record, "body": {**record["body"], key: SYSTEM}} if "body" in record else {
        **record, key: SYSTEM}  # fmt: skip
    dialogue = read(holder)
    assert (dialogue.system, said(dialogue)) == (SYSTEM, turns)


@pytest.mark.parametrize("name", FORMS)
def test_tools_are_read_in_each_form(name: str) -> None:
    record, turns, _ = FORMS[name]
    more = {"tools": [TOOL]}
    record = {**record, "body": {**record["body"], **more}} if "body" in record else record | more
    dialogue = read(record)
    assert (dialogue.tools[0]["function"], said(dialogue)) == (TOOL, turns)


def test_dollys_context_follows_the_question() -> None:
    dialogue = read({"instruction": Q, "context": "Jupiter has four.", "response": A})
    assert dialogue.turns[0].text == f"{Q}\nInput:\nJupiter has four."


CALLED = [("user", Q), ("assistant", ""), ("tool", '{"m": 6}'), ("assistant", A)]
BLOCKS: dict[str, dict[str, Any]] = {
    "Anthropic": {
        "tools": [{"name": "tide", "description": "Tide.", "input_schema": TOOL["parameters"]}],
        "messages": [
            {"role": "user", "content": Q},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "c", "name": "tide", "input": {"at": "Brest"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "c", "content": '{"m": 6}'}]},
            {"role": "assistant", "content": [{"type": "text", "text": A}]},
        ],
    },
    "Gemini": {
        "tools": [{"functionDeclarations": [TOOL]}],
        "contents": [
            {"role": "user", "parts": [{"text": Q}]},
            {"role": "model", "parts": [
                {"functionCall": {"name": "tide", "args": {"at": "Brest"}}}]},
            {"role": "user", "parts": [
                {"functionResponse": {"name": "tide", "response": {"m": 6}}}]},
            {"role": "model", "parts": [{"text": A}]},
        ],
    },
    "Bedrock": {
        "toolConfig": {"tools": [{"toolSpec": {
            "name": "tide", "description": "Tide.", "inputSchema": {"json": TOOL["parameters"]}}}]},
        "messages": [
            {"role": "user", "content": [{"text": Q}]},
            {"role": "assistant", "content": [
                {"toolUse": {"toolUseId": "c", "name": "tide", "input": {"at": "Brest"}}}]},
            {"role": "user", "content": [
                {"toolResult": {"toolUseId": "c", "content": [{"json": {"m": 6}}]}}]},
            {"role": "assistant", "content": [{"text": A}]},
        ],
    },
    "ms-swift": {
        "tools": json.dumps([TOOL]),
        "messages": [
            {"role": "user", "content": Q},
            {"role": "tool_call", "content": '{"name": "tide", "arguments": {"at": "Brest"}}'},
            {"role": "tool_response", "content": '{"m": 6}'},
            {"role": "assistant", "content": A},
        ],
    },
    "glaive": {
        "system": f"SYSTEM: You have access to the following functions -\n{json.dumps(TOOL)}",
        "chat": f'USER: {Q}\n\n\nASSISTANT: <functioncall> {{"name": "tide", "arguments": '
                '\'{"at": "Brest"}\'} <|endoftext|>\n\n\nFUNCTION RESPONSE: {"m": 6}\n\n\n'
                f"ASSISTANT: {A} <|endoftext|>",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_calls_results_and_definitions_are_read_from_each_projects_blocks(name: str) -> None:
    dialogue = read(BLOCKS[name])
    assert said(dialogue) == CALLED
    (call,) = dialogue.turns[1].calls
    assert (call.name, call.arguments) == ("tide", {"at": "Brest"})
    assert dialogue.turns[2].name == "tide"
    assert dialogue.tools[0]["function"] == TOOL


def test_xlams_answers_are_calls() -> None:
    calls = [{"name": "tide", "arguments": {"at": "Brest"}}]
    record = {"query": Q, "tools": json.dumps([TOOL]), "answers": json.dumps(calls)}
    dialogue = read(record)
    assert dialogue.turns[1].calls[0].arguments == {"at": "Brest"}
    assert dialogue.tools[0]["function"] == TOOL


@pytest.mark.parametrize("key", sorted(ALL_MARKS - {"mask", "masked"}))
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_a_mark_of_a_turn_or_a_record_leaves_its_answers_out(key: str, value: Any) -> None:
    marked = [OPENAI[0], {**OPENAI[1], key: value}]
    for record in ({"messages": marked}, {"dialog": marked}, {**ASKED, key: value}):
        assert not any(t.supervised for t in read(record).turns if t.role == "assistant")
    assert read({"messages": [OPENAI[0], {**OPENAI[1], key: True}]}).turns[1].supervised


@pytest.mark.parametrize("key", sorted(ALL_MARKS))
@pytest.mark.parametrize("value", [0.5, "no", [0, 1], 2])
def test_any_other_mark_is_a_bad_record_that_names_the_key(key: str, value: Any) -> None:
    for record in ({"messages": [OPENAI[0], {**OPENAI[1], key: value}]}, {**ASKED, key: value}):
        with pytest.raises(UserError, match=f'"{key}"'):
            read(record)


def test_masked_leaves_out_and_mask_is_refused() -> None:
    assert not read({"messages": [OPENAI[0], {**OPENAI[1], "masked": True}]}).turns[1].supervised
    with pytest.raises(UserError, match="no common meaning"):
        read({"messages": [OPENAI[0], {**OPENAI[1], "mask": True}]})


PREFERENCE: dict[str, Any] = {
    "alpaca": {"instruction": Q, "input": "", "chosen": A, "rejected": "The Sun."},
    "prompt": {"prompt": Q, "chosen": A, "rejected": "The Sun."},
    "dialogues": {"prompt": Q, "chosen": OPENAI, "rejected": [OPENAI[0]]},
    "TRL": {"prompt": OPENAI[:1], "chosen": OPENAI[1:], "rejected": OPENAI[:1]},
    "ShareGPT": {"conversations": [{"from": "human", "value": Q}],
                 "chosen": {"from": "gpt", "value": A}, "rejected": {"from": "gpt", "value": "No"}},
    "ms-swift": {"messages": OPENAI, "rejected_response": "The Sun."},
    "hh-rlhf": {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": "\n\nHuman: a"},
    "KTO": {"messages": OPENAI, "label": True},
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_data_is_refused_and_chosen_answers_are_taken(name: str) -> None:
    with pytest.raises(UserError, match="--preference chosen"):
        read(PREFERENCE[name])
    tally = Tally()
    (dialogue,) = dialogues_of([(PREFERENCE[name], "f: record 0")], tally, how=Reading("chosen"))
    assert said(dialogue) == ONE
    assert not tally.unused
    assert "chosen answers" in str(tally)


def test_an_answer_labelled_bad_is_counted_and_never_learnt() -> None:
    tally = Tally()
    bad, good = ({**ASKED, "label": label} for label in (False, True))
    records = [(bad, "f: record 0"), (good, "f: record 1")]
    (dialogue,) = dialogues_of(records, tally, how=Reading("chosen"))
    assert dialogue.id == "1"
    assert tally.dropped == {"rejected answer": 1}


@pytest.mark.parametrize("key", ["images", "image", "audios", "videos"])
def test_a_record_with_media_is_a_bad_record(key: str) -> None:
    with pytest.raises(UserError, match=f'"{key}"'):
        read({**ASKED, key: ["a.jpg"]})
    assert said(read({**ASKED, key: []})) == ONE


def test_columns_that_are_not_used_stand_in_the_account() -> None:
    how, tally = Reading(columns={"user": "q", "assistant": "a"}), Tally()
    (dialogue,) = dialogues_of([({"q": Q, "a": A, "hint": "x"}, "f: record 0")], tally, how=how)
    assert said(dialogue) == ONE
    assert "hint" in str(tally)


@pytest.mark.parametrize("key", ["choices", "options"])
def test_a_question_without_its_choices_is_counted_as_changed(key: str) -> None:
    tally = Tally()
    [*dialogues_of([({"question": Q, "answer": A, key: [A, A2]}, "f: record 0")], tally)]
    assert f'"{key}" not used: 1' in str(tally)


def test_named_roles_are_read() -> None:
    record = {"messages": [{"role": "Ann", "content": Q}, {"role": "Zed", "content": A}]}
    with pytest.raises(UserError, match="--roles user=Ann or assistant=Ann"):
        read(record)
    assert said(read(record, Reading(roles={"Ann": "user", "Zed": "assistant"}))) == ONE


FLAGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "preference": (PREFERENCE["prompt"], ["--preference", "chosen"]),
    "roles": (
        {"messages": [{"role": "Ann", "content": Q}, {"role": "Zed", "content": A}]},
        ["--roles", "user=Ann", "assistant=Zed"],
    ),
    "columns": ({"q1": Q, "a1": A}, ["--columns", "user=q1", "assistant=a1"]),
}


@pytest.mark.parametrize("name", FLAGS)
def test_the_flags_that_a_refusal_names_train_and_convert(
    name: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, flags = FLAGS[name]
    file, converted = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text(json.dumps(record) + "\n")
    model = ["--model_name_or_path", str(tiny_model)]
    with pytest.raises(UserError, match=flags[0]):
        show.main([*model, "--data_path", str(file)])
    show.main([*model, "--data_path", str(file), *flags])
    convert.main(["--in", str(file), "--out", str(converted), *flags])
    show.main([*model, "--data_path", str(converted)])
    assert capsys.readouterr().out.count(A) == 2


REFUSED = {
    "two columns": {"riddle": Q, "reply_text": A},
    "two answers": {"problem": Q, "answer": A, "solution": "Long."},
    "two questions": {"prompt": Q, "question": "Short?", "response": A},
    "preference": {"prompt": Q, "chosen": A, "rejected": "No."},
    "tree": {"message_tree_id": "t", "prompt": {"text": Q, "role": "prompter", "replies": [
        {"text": A, "role": "assistant", "replies": []}]}},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_command_of_a_refusal_reads_the_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text(json.dumps(REFUSED[name]) + "\n")
    with pytest.raises(UserError) as refused:
        dialogues_in(Path("in.jsonl"))
    command = re.search(r"python -m data convert (.*?)(?:[,.] or|$)", str(refused.value))
    assert command, refused.value
    convert.main([*shlex.split(command[1].removesuffix(",")), "--processes", "1"])
    (dialogue,), _ = dialogues_in(Path("data.jsonl"))
    assert said(dialogue) == ONE


def test_the_flag_for_a_role_is_quoted_for_the_shell() -> None:
    record = {"messages": [{"role": "Ann Lee", "content": Q}, {"role": "bot", "content": A}]}
    with pytest.raises(UserError, match=r"--roles user='Ann Lee' or assistant='Ann Lee'"):
        read(record)


def test_text_alone_is_refused() -> None:
    with pytest.raises(UserError, match="marks who speaks"):
        read({"text": "A long tale of the sea."})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "human", "text", "type", "parts"]),
        inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
KEYS = ["messages", "conversations", "chosen", "rejected", "label", "prompt", "response", "history"]
KEYS += ["contents", "text", "chat", "instances", "instruction", "body", "data", "system", "tools"]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from([*KEYS, "query", "answers"]), JSON, max_size=4))
def test_any_record_is_read_or_is_a_bad_record(record: dict[str, Any]) -> None:
    for how in (DEFAULT_READING, Reading("chosen")):
        tally = Tally()
        [*dialogues_of([(record, "f: record 0")], tally, "skip", how=how)]
        assert tally.read == 1


def test_a_plain_sharegpt_record_is_returned_itself() -> None:
    record = {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}
    assert read_form(record)[0] is record


def test_turns_of_an_arrow_map_are_no_pairs_of_texts() -> None:
    turns = [["('role', 'user')", f"('content', '{Q}')"], ["('role', 'x')", "('content', 'y')"]]
    for key in ("messages", "conversations", "conversation"):
        with pytest.raises(UserError):
            read({key: turns})
