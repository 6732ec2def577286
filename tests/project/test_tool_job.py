"""The bundled model learns from the bundled dialogues when to call a tool, and how."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data.bundled.make import TOOLS
from data.dialogues.conversation import ToolCall, Turn
from loop.adapters.chat import ChatConfig, Speaker, load_speaker
from tests.project.test_readme import blocks, command_of
from tests.support.helpers import ROOT, launch

PAGE, ADAPTERS = ROOT / "docs/data.md", ROOT / "docs/adapters.md"
# Unseen questions, each with the item that it asks about.
NEEDS_CALL = {
    "How many flashlights do we have?": "flashlights",
    "Where are the pillows?": "pillows",
    "Are there any paper clips left?": "paper clips",
    "On which shelf are the shovels?": "shovels",
    "I need tea bags.": "tea bags",
    "Where is the microwave?": "microwave",
    "Do we have a tripod?": "tripod",
    "Can I borrow the telescope?": "telescope",
    "Please look for the safety vests.": "safety vests",
    "How many umbrellas are still there?": "umbrellas",
}
NEEDS_TWO_CALLS = {"How many forks and how many spoons do we have?": ("forks", "spoons")}
# Unseen questions without an item of the storeroom.
PLAIN = (
    "What is the capital of France?",
    "Who painted the Mona Lisa?",
    "How many hours are in a day?",
    "What is 8 + 5?",
    "What is a ladder used for?",
    "Who made you?",
)
CALL = re.compile(r"<think>([^<]+)</think>\n<tool_call>(.*)</tool_call>")
ANSWER = re.compile(r"<think>[^<]+</think>\n([^<]+)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the documented command."""
    _, config, *flags = shlex.split(command_of(PAGE, "./launch.sh accelerate_configs"))
    assert config == "accelerate_configs/zero2.yaml"
    output = tmp_path_factory.mktemp("runs") / "tool_job"
    launch("zero2", output, *flags)
    return output


@pytest.fixture(scope="module")
def speaker(folder: Path) -> Speaker:
    return load_speaker(ChatConfig(adapter=(str(folder),), tools=str(TOOLS)))


def call_in(answer: str) -> ToolCall | None:
    """Return the call of an answer that reasons, calls the tool and stops there."""
    found = CALL.fullmatch(answer)
    if not found:
        return None
    call: dict[str, Any] = json.loads(found[2])
    return ToolCall(call["name"], call["arguments"])


def asks_for(call: ToolCall | None, item: str) -> bool:
    """Return whether the call looks the item up, in the singular or the plural."""
    if call is None or call.name != "lookup" or [*call.arguments] != ["item"]:
        return False
    return str(call.arguments["item"]).removesuffix("s") == item.removesuffix("s")


def with_result(asked: tuple[Turn, ...], answer: str, left: int, shelf: str) -> tuple[Turn, ...]:
    """Return the turns with an answer that calls the tool, and the tool's result."""
    call, found = call_in(answer), CALL.fullmatch(answer)
    assert call
    assert found
    result = json.dumps({"left": left, "shelf": shelf})
    calling = Turn("assistant", "", reasoning=found[1], calls=(call,))
    return (*asked, calling, Turn("tool", result, name=call.name))


def test_nine_of_ten_unseen_questions_become_a_call_and_its_result_an_answer(
    speaker: Speaker,
) -> None:
    right, used = [], []
    answers = {}
    for number, (question, item) in enumerate(NEEDS_CALL.items()):
        asked = (Turn("user", question),)
        answer = answers[question] = speaker.answer(asked)
        if not asks_for(call_in(answer), item):
            continue
        right.append(question)
        left, shelf = 23 + 3 * number, f"{'ABCD'[number % 4]}{number % 6 + 1}"
        after = speaker.answer(with_result(asked, answer, left, shelf))
        answers[f"{question} {left} {shelf}"] = after
        text = ANSWER.fullmatch(after)
        used += [question] if text and (str(left) in text[1] or shelf in text[1]) else []
    assert len(right) >= 9, answers
    assert len(used) >= 8, answers


def test_an_unseen_question_without_an_item_is_answered_without_a_call(speaker: Speaker) -> None:
    answers = {question: speaker.answer((Turn("user", question),)) for question in PLAIN}
    assert all(ANSWER.fullmatch(answer) for answer in answers.values()), answers
    assert "Paris" in answers[PLAIN[0]]


def test_a_question_about_two_items_becomes_two_calls(speaker: Speaker) -> None:
    for question, items in NEEDS_TWO_CALLS.items():
        turns: tuple[Turn, ...] = (Turn("user", question),)
        for number, item in enumerate(items):
            answer = speaker.answer(turns)
            assert asks_for(call_in(answer), item), answer
            turns = with_result(turns, answer, 31 + 14 * number, f"C{number + 2}")
        final = ANSWER.fullmatch(speaker.answer(turns))
        assert final
        assert "31" in final[1]
        assert "45" in final[1]


def test_the_documented_lines_answer_from_the_result(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = [code for code in blocks(ADAPTERS, "python") if "load_speaker" in code]
    code = code.replace("runs/tool_job", str(folder)).replace("data/bundled", str(TOOLS.parent))
    exec(code, {})
    assert ANSWER.fullmatch(capsys.readouterr().out.strip())
