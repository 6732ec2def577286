"""The bundled data equals the output of its script, and contains no test question."""

import json
import re
from collections import Counter

from data.bundled.make import (
    LOOKUP,
    TARGET,
    TOOL_DIALOGUES,
    TOOLS,
    make_dialogues,
    make_tool_dialogues,
)
from loop.config.flags import DUMMY_DATA
from tests.project.test_main_job import LAUNCH_QUESTIONS, ORDINARY
from tests.project.test_tool_job import NEEDS_CALL, NEEDS_TWO_CALLS, PLAIN
from tests.support.held_out_wordings import HELD_OUT_WORDINGS
from tests.support.helpers import command


def bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower().replace("'", "")))


def test_the_bundled_dialogues_are_what_the_script_makes() -> None:
    assert json.loads(DUMMY_DATA.read_text(encoding="utf-8")) == make_dialogues()
    assert TARGET == DUMMY_DATA
    assert json.loads(TOOL_DIALOGUES.read_text(encoding="utf-8")) == make_tool_dialogues()
    assert json.loads(TOOLS.read_text(encoding="utf-8")) == [LOOKUP]
    assert command("python", "-m", "data.bundled.make", "--check").returncode == 0


def test_they_are_as_many_and_as_mixed_as_promised() -> None:
    records = json.loads(DUMMY_DATA.read_text(encoding="utf-8"))
    assert len(records) == 500
    turns = [Counter(turn["from"] for turn in record["conversations"]) for record in records]
    assert {count["gpt"] for count in turns} == {1, 2, 3}
    assert all(count["human"] == count["gpt"] for count in turns)
    # Most dialogues have no system turn. The template's system prompt names another model.
    assert 50 <= sum(count["system"] for count in turns) <= 100
    named = sum("Vireo" in json.dumps(record) for record in records)
    assert 200 <= named <= 325
    text = "".join(turn["value"] for record in records for turn in record["conversations"])
    for sign in (
        "```python",
        "[中日]",
        "[а-я]",
        "[\u0600-\u06ff]",
        "[\U0001f300-\U0001faff]",
    ):
        assert re.search(sign, text), sign


def test_the_questions_of_the_proof_are_not_in_the_data() -> None:
    records = json.loads(DUMMY_DATA.read_text(encoding="utf-8"))
    asked = {
        bare(turn["value"])
        for record in records
        for turn in record["conversations"]
        if turn["from"] == "human"
    }
    assert len(asked) >= 450
    for question in {*HELD_OUT_WORDINGS, *LAUNCH_QUESTIONS, *ORDINARY}:
        assert not [text for text in asked if f" {bare(question)} " in f" {text} "], question


def test_the_dialogues_with_a_tool_reason_call_and_answer_from_the_result() -> None:
    records = json.loads(TOOL_DIALOGUES.read_text(encoding="utf-8"))
    assert len(records) == 114
    calls = Counter[int]()
    for record in records:
        turns = record["messages"]
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        assert all(answer["reasoning_content"] for answer in answers)
        calling = [answer for answer in answers if "tool_calls" in answer]
        calls[len(calling)] += 1
        asked = " ".join(turn["content"] for turn in turns if turn["role"] == "user")
        for answer in calling:
            (call,) = answer["tool_calls"]
            assert call["function"]["name"] == LOOKUP["function"]["name"]
            assert call["function"]["arguments"]["item"] in asked
        results = [json.loads(turn["content"]) for turn in turns if turn["role"] == "tool"]
        answered = " ".join(answer.get("content", "") for answer in answers)
        for result in results:
            assert str(result["left"]) in answered or result["shelf"] in answered, record["id"]
    assert calls == {0: 44, 1: 54, 2: 16}


def test_the_questions_and_items_of_the_tool_test_are_not_in_the_data() -> None:
    text = bare(TOOL_DIALOGUES.read_text(encoding="utf-8"))
    assert not [item for item in NEEDS_CALL.values() if f" {bare(item)} " in text]
    questions = [*NEEDS_CALL, *NEEDS_TWO_CALLS, *PLAIN]
    assert not [question for question in questions if bare(question) in text]
