"""The bundled model learns from the bundled dialogues when to call a tool, and how."""

import json
import shlex
from pathlib import Path

import pytest

from data.bundled.make import TOOLS
from data.dialogues.conversation import Turn
from loop.adapters import chat
from loop.adapters.chat import ChatConfig, Speaker, load_speaker
from tests.project.test_readme import blocks, command_of
from tests.support.helpers import ROOT, launch

PAGE = ROOT / "docs/data.md"
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


def asks_for(answer: Turn, item: str) -> bool:
    """Return whether the answer is reasoning and a call for the item, singular or plural."""
    if len(answer.calls) != 1 or answer.text or not answer.reasoning:
        return False
    (call,) = answer.calls
    if call.name != "lookup" or [*call.arguments] != ["item"]:
        return False
    return str(call.arguments["item"]).strip().removesuffix("s") == item.removesuffix("s")


def is_final(answer: Turn) -> bool:
    """Return whether the answer is reasoning and text."""
    return bool(answer.reasoning and answer.text and not answer.calls and "<" not in answer.text)


def with_result(asked: tuple[Turn, ...], answer: Turn, left: int, shelf: str) -> tuple[Turn, ...]:
    """Return the turns with an answer that calls the tool, and the tool's result."""
    result = json.dumps({"left": left, "shelf": shelf})
    return (*asked, answer, Turn("tool", result, name=answer.calls[0].name))


def test_eight_of_ten_unseen_questions_become_a_call_and_its_result_an_answer(
    speaker: Speaker,
) -> None:
    right, used = [], []
    answers = {}
    for number, (question, item) in enumerate(NEEDS_CALL.items()):
        asked = (Turn("user", question),)
        answer = answers[question] = speaker.answer(asked)
        if not asks_for(answer, item):
            continue
        right.append(question)
        left, shelf = 23 + 3 * number, f"{'ABCD'[number % 4]}{number % 6 + 1}"
        after = speaker.answer(with_result(asked, answer, left, shelf))
        answers[f"{question} {left} {shelf}"] = after
        found = str(left) in after.text or shelf in after.text
        used += [question] if is_final(after) and found else []
    assert len(right) >= 8, answers
    assert len(used) >= 7, answers


def test_an_unseen_question_without_an_item_is_answered_without_a_call(speaker: Speaker) -> None:
    answers = {question: speaker.answer((Turn("user", question),)) for question in PLAIN}
    assert all(map(is_final, answers.values())), answers
    assert "Paris" in answers[PLAIN[0]].text


def test_a_question_about_two_items_becomes_two_calls(speaker: Speaker) -> None:
    for question, items in NEEDS_TWO_CALLS.items():
        turns: tuple[Turn, ...] = (Turn("user", question),)
        for number, item in enumerate(items):
            answer = speaker.answer(turns)
            assert asks_for(answer, item), answer
            turns = with_result(turns, answer, 31 + 14 * number, f"C{number + 2}")
        final = speaker.answer(turns)
        assert is_final(final)
        assert "31" in final.text
        assert "45" in final.text


def test_the_documented_chat_takes_the_result_of_the_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (text,) = [text for text in blocks(PAGE, "text") if "/result" in text]
    typed = [line.removeprefix("you: ") for line in text.splitlines() if line.startswith("you: ")]
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    chat.main(["--adapter", str(folder), "--tools", str(TOOLS)])
    output = capsys.readouterr().out
    assert output.count("reasoning: ") == len(typed)
    assert 'call: lookup({"item": "telescopes"})' in output
    assert "17" in output
    assert "B2" in output or "Rome" in output
