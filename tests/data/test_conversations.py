"""Reasoning, tools and tool calls of every format reach the dialogue, and nothing is lost."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from data.dialogues.conversation import Dialogue, ToolCall, Turn
from data.dialogues.formats import to_messages
from data.dialogues.sharegpt import Tally, dialogues_of, read_dialogues
from data.encoding.templates import template_arguments
from data.errors import BadRecord, UserError
from data.preparation import clean, convert, split
from loop.config import preflight
from loop.config.flags import Config
from loop.inputs.training_data import read_training_data
from tests.support.chat_templates import CASES, LOOKUP

CALL = {"function": {"name": "lookup", "arguments": {"city": "Rome"}}, "id": "a1", "type": "x"}
ASKED = {"role": "user", "content": "Weather?"}


def read(record: dict[str, Any], **how: Any) -> Dialogue:
    (dialogue,) = dialogues_of([(record, "f.json: record 0")], Tally(), **how)
    return dialogue


def messages(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [ASKED, *turns], **more}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(key: str) -> None:
    answer = {"role": "assistant", "content": "So.", key: "Because."}
    assert read(messages(answer)).turns[1] == Turn("assistant", "So.", reasoning="Because.")
    sharegpt = {"conversations": [
        {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So.", key: "Because."}
    ]}  # fmt: skip
    assert read(sharegpt).turns[1] == Turn("assistant", "So.", reasoning="Because.")


@pytest.mark.parametrize("tools", [[LOOKUP], json.dumps([LOOKUP]), [LOOKUP["function"]], LOOKUP])
@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tool_definitions_are_read_as_lists_text_and_bare_functions(key: str, tools: Any) -> None:
    answer = {"role": "assistant", "content": "So."}
    assert read(messages(answer, **{key: tools})).tools == (LOOKUP,)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "So."}]
    assert read({"conversations": turns, key: tools}).tools == (LOOKUP,)
    assert read({"instruction": "Hi", "output": "So.", key: tools}).tools == (LOOKUP,)


def test_calls_and_results_are_read_with_ids_and_names() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    old = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    result = {"role": "tool", "content": "Rain", "tool_call_id": "a1"}
    dialogue = read(messages(called, result, old, {"role": "function", "content": "Sun"}))
    call = ToolCall("lookup", {"city": "Rome"}, "a1")
    assert dialogue.turns[1:] == (
        Turn("assistant", "", calls=(call,)),
        Turn("tool", "Rain", name="lookup", call_id="a1"),
        Turn("assistant", "", calls=(ToolCall("lookup", {"city": "Rome"}),)),
        Turn("tool", "Sun", name="lookup"),
    )


def test_a_function_call_turn_of_sharegpt_is_a_call_if_it_is_json_and_else_text() -> None:
    text = json.dumps({"name": "lookup", "arguments": {"city": "Rome"}})
    for value, expected in (
        (text, Turn("assistant", "", calls=(ToolCall("lookup", {"city": "Rome"}),))),
        (f"<think>\nHm.\n</think>\n{text}",
         Turn("assistant", "", reasoning="Hm.", calls=(ToolCall("lookup", {"city": "Rome"}),))),
        ("lookup(Rome)", Turn("assistant", "lookup(Rome)")),
    ):  # fmt: skip
        turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": value}]
        record = {"conversations": turns, "system": "Be brief."}
        dialogue = read(record)
        assert (dialogue.system, dialogue.turns[1]) == ("Be brief.", expected)


def test_the_last_answer_that_may_be_trained_is_trained() -> None:
    answers = [{"role": "assistant", "content": "A"}, ASKED]
    last = {"role": "assistant", "content": "B", "train": False}
    dialogue = read(messages(*answers, last), train_on="last")
    assert [turn.supervised for turn in dialogue.turns] == [False, True, False, False]


def test_arguments_that_arrow_filled_with_null_are_not_invented(tmp_path: Path) -> None:
    calls = [{"city": "Rome"}, {"hour": 7}]
    rows = [
        messages({"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "lookup", "arguments": arguments}}
        ]})
        for arguments in calls
    ]  # fmt: skip
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = read_dialogues([tmp_path / "d.parquet"], Tally())
    assert [dialogue.turns[1].calls[0].arguments for dialogue in found] == calls


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"tool_calls": 3}, '"tool_calls" is a number; expected a list'),
        ({"tool_calls": [{"x": 1}]}, "a tool call is an object; expected an object that names"),
        ({"content": [{"type": "image_url"}]}, "has a part 'image_url'; expected text alone"),
        ({"content": [{"type": "input_audio", "text": ""}]}, "has a part 'input_audio'"),
        ({"content": [{"type": "text", "text": "a", "image": "b"}]}, "has a part 'image'"),
        ({"content": [{"file": "a.pdf"}]}, "has a part 'file'; expected text alone"),
        ({"content": "a", "reasoning": ["b"]}, '"reasoning" is a list; expected a string'),
        ({"content": "a", "reasoning": "\ud800"}, "has half a surrogate pair"),
        ({"content": "a", "weight": 0.5}, 'found "weight" 0.5'),
        ({"tool_calls": [{"name": "f", "args": {"a": 1}}]}, 'has args; expected "name" and'),
        ({"tool_calls": [{"name": "f\ud800"}]}, "has half a surrogate pair"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": b"x"}}]}, "cannot be written as JSON"),
    ],
)
def test_what_cannot_be_used_is_a_bad_record(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"f\.json: record 0: ") as refused:
        read(messages({"role": "assistant", "content": None, **answer}))
    assert message in str(refused.value)


@pytest.mark.parametrize("part", [
    {"type": "text", "text": "So."}, {"type": "input_text", "text": "So."},
    {"type": "output_text", "text": "So.", "annotations": []}, {"text": "So."},
    {"type": "text", "text": "So.", "image_url": None},
])  # fmt: skip
def test_parts_of_text_are_text_under_each_of_their_types(part: dict[str, Any]) -> None:
    dialogue = read(messages({"role": "assistant", "content": [part, part]}))
    assert dialogue.turns[1].text == "So.So."


NAMED = {"name": "lookup", "arguments": '{"city": "Rome"}'}
OTHER = {"name": "lookup", "arguments": {"city": "Bonn"}}
BOTH = [
    ({"reasoning_content": "A."}, {"thinking": "A."}, {"thinking": "B."}),
    ({"reasoning_content": "A."}, {"reasoning": "A."}, {"reasoning": "B."}),
    ({"reasoning": "A."}, {"thinking": "A."}, {"thinking": "B."}),
    ({"tool_calls": [CALL]}, {"function_call": NAMED}, {"function_call": OTHER}),
]


@pytest.mark.parametrize(("first", "equal", "other"), BOTH)
def test_two_keys_of_a_turn_for_one_thing_hold_the_same_or_are_a_bad_record(
    first: dict[str, Any], equal: dict[str, Any], other: dict[str, Any]
) -> None:
    answer = {"role": "assistant", "content": "So.", **first}
    alone = read(messages(answer)).turns
    assert read(messages({**answer, **equal})).turns == alone
    (one,), (two,) = first, other
    differ = f'turn 1: "{one}" and "{two}" differ; expected one of them'
    sharegpt = {"from": "gpt", "value": "So.", **first, **other}
    turns = [{"from": "human", "value": "Weather?"}, sharegpt]
    for record in (messages({**answer, **other}), {"conversations": turns}):
        with pytest.raises(UserError, match=differ):
            read(record)
        tally = Tally()
        assert not [*dialogues_of([(record, "f.json: record 0")], tally, "skip")]
        assert tally.dropped == {"two keys differ": 1}


def test_tools_and_functions_hold_the_same_or_are_a_bad_record() -> None:
    answer, other = {"role": "assistant", "content": "So."}, {"name": "search"}
    both = messages(answer, tools=json.dumps([LOOKUP]), functions=[LOOKUP["function"]])
    assert read(both).tools == (LOOKUP,)
    assert read(messages(answer, tools="[]", functions=[LOOKUP])).tools == (LOOKUP,)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "So."}]
    for record in ({"messages": [ASKED, answer]}, {"conversations": turns},
                   {"instruction": "Hi", "output": "So."}):  # fmt: skip
        with pytest.raises(UserError, match='"tools" and "functions" differ; expected one'):
            read({**record, "tools": [LOOKUP], "functions": [other]})


def test_the_text_of_a_function_call_turn_and_its_keys_do_not_differ() -> None:
    value = f"<think>A.</think>{json.dumps(NAMED)}"
    for more, differ in (
        ({"tool_calls": [CALL], "reasoning": "A."}, ""),
        ({"tool_calls": [OTHER]}, '"value" and "tool_calls" differ'),
        ({"thinking": "B."}, '"value" and "reasoning" differ'),
    ):
        turn = {"from": "function_call", "value": value, **more}
        record = {"conversations": [{"from": "human", "value": "Hi"}, turn]}
        if not differ:
            assert read(record).turns[1].reasoning == "A."
            continue
        with pytest.raises(UserError, match=differ):
            read(record)


RESERVED = [
    *("tokenize", "add_generation_prompt", "messages", "conversation", "tools", "return_dict"),
    *("chat_template", "continue_final_message", "padding", "truncation", "max_length"),
    *("return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs", "eos_token"),
]


@pytest.mark.parametrize("name", RESERVED)
def test_a_reserved_template_argument_is_refused_in_the_flag_and_in_a_record(name: str) -> None:
    given = {name: True, "enable_thinking": False}
    remedy = f"found {name}, which the trainer itself gives.* Leave {name} out"
    with pytest.raises(UserError, match=remedy):
        template_arguments(json.dumps(given))
    (problem,) = preflight.problems(Config("model", chat_template_kwargs=json.dumps(given)))
    assert problem.startswith(f"--chat_template_kwargs: found {name}, ")
    record = messages({"role": "assistant", "content": "So."}, chat_template_kwargs=given)
    with pytest.raises(UserError, match=f'"chat_template_kwargs" has {name}, which'):
        read(record)
    tally = Tally()
    assert not [*dialogues_of([(record, "f.json: record 0")], tally, "skip")]
    assert tally.dropped == {"reserved template arguments": 1}
    with pytest.raises(BadRecord, match=f'"chat_template_kwargs" has {name}, which'):
        split.split(split.Settings("model", "chat", 99, "drop", 0.0), record, "f.json: record 0")


def test_documents_and_a_templates_own_variables_are_arguments() -> None:
    given = {"documents": [{"title": "A", "text": "B"}], "enable_thinking": False}
    assert json.loads(template_arguments(json.dumps(given))) == given
    record = messages({"role": "assistant", "content": "So."}, chat_template_kwargs=given)
    assert read(record).template_arguments == given


def test_keys_that_are_not_used_stand_in_the_account_and_lost_meaning_ends_the_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    plain = messages({"role": "assistant", "content": "So."}, source="web")
    lost = messages({"role": "assistant", "content": "So."}, images=["a.png"], label=None)
    file = tmp_path / "d.json"
    file.write_text(json.dumps([plain] * 9 + [lost]))
    config = Config(str(tiny_model), data_path=(str(file),), max_dropped=0.1)
    account = str(read_training_data(config))
    assert '"images" not used: 1; other keys: source' in account
    with pytest.raises(UserError, match="found 1 of 10 records with a key that changes"):
        read_training_data(Config(str(tiny_model), data_path=(str(file),)))


def test_tools_and_reasoning_decide_the_side_of_a_held_out_dialogue() -> None:
    answer = {"role": "assistant", "content": "So."}
    shares = {
        read(record).share
        for record in (
            messages(answer),
            messages(answer, tools=[LOOKUP]),
            messages({**answer, "reasoning": "Hm."}),
            messages({**answer, "tool_calls": [CALL]}),
        )
    }
    assert len(shares) == 4


SEARCHED = {
    "id": "7",
    "tools": [LOOKUP],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Is it raining <b>in</b> Rome, or is it clear there today?"},
        {"role": "assistant", "content": "", "reasoning_content": "I need <b>it</b>.",
         "tool_calls": [{"id": "a1", "type": "function",
                         "function": {"name": "lookup", "arguments": {"city": "<b>Rome</b>"}}}]},
        {"role": "tool", "content": '{"a": "<p>a</p>  <ol><li>b</li>"}', "tool_call_id": "a1"},
        {"role": "assistant", "content": "No, the sky over Rome is clear, and it is warm."},
        {"role": "user", "content": "Thanks! And Paris, London, Berlin, Madrid and Oslo?"},
        {"role": "assistant", "content": "You are welcome.", "weight": 0},
    ],
}  # fmt: skip


COMMANDS = {"clean": clean.main, "convert": convert.main, "split": split.main}


def prepared(folder: Path, name: str, *flags: str | Path) -> list[Any]:
    source, out = folder / "in.json", folder / f"{name}.json"
    source.write_text(json.dumps([SEARCHED]))
    COMMANDS[name](["--in", str(source), "--out", str(out), "--report", str(folder / "r.json"),
          *map(str, flags)])  # fmt: skip
    found: list[Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def test_convert_writes_messages_with_everything_in_them(tmp_path: Path) -> None:
    (made,) = prepared(tmp_path, "convert", "--to", "messages")
    assert made == SEARCHED
    (sharegpt,) = prepared(tmp_path, "convert")
    assert to_messages(sharegpt) == SEARCHED
    assert read(sharegpt).turns == read(SEARCHED).turns


def test_clean_leaves_calls_results_and_reasoning_alone(tmp_path: Path) -> None:
    (made,) = prepared(tmp_path, "clean")
    cleaned, before = read(made), read(SEARCHED)
    assert cleaned.turns[0].text == "Is it raining **in** Rome, or is it clear there today?"
    assert cleaned.turns[1:] == before.turns[1:]
    assert cleaned.tools == before.tools


def test_split_keeps_a_call_with_its_result_and_the_tools_with_each_piece(
    tiny_model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(CASES["rewrites"].text)
    model = ("--model_name_or_path", tiny_model, "--chat_template", own)
    pieces = prepared(tmp_path, "split", *model, "--model_max_length", "365")
    assert [piece["id"] for piece in pieces] == ["7_1", "7_5"]
    first, second = map(read, pieces)
    assert [turn.role for turn in first.turns] == ["user", "assistant", "tool", "assistant"]
    assert first.turns[1].calls[0].name == "lookup"
    assert first.tools == second.tools == (LOOKUP,)
    assert first.system == second.system == "Be brief."
