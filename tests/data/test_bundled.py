"""The bundled dialogues equal the output of their script, and contain no test question."""

import json
import re
from collections import Counter

from data.bundled.make import TARGET, make_dialogues
from loop.config.flags import DUMMY_DATA
from tests.project.test_main_job import LAUNCH_QUESTIONS, ORDINARY
from tests.support.held_out_wordings import HELD_OUT_WORDINGS
from tests.support.helpers import command


def bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower().replace("'", "")))


def test_the_bundled_dialogues_are_what_the_script_makes() -> None:
    assert json.loads(DUMMY_DATA.read_text(encoding="utf-8")) == make_dialogues()
    assert TARGET == DUMMY_DATA
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
