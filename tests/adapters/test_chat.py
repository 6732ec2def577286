"""Chat: several adapters, system prompts, comparison, and files of questions."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.dialogues.conversation import ToolCall, Turn
from data.encoding.generated import printed
from data.errors import UserError
from loop.adapters import chat
from loop.adapters.chat import BASE, ChatConfig, Speaker, load_speaker, read_prompts
from tests.conftest import trainer
from tests.support.helpers import write_dialogues

QUESTION = (Turn("user", "What are you?"),)
NAMES = ("fox", "owl")


@pytest.fixture(scope="module", params=["decoder", "T5"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    model = request.getfixturevalue("tiny_model" if request.param == "decoder" else "tiny_t5")
    folder = tmp_path_factory.mktemp("chat")
    run = trainer(model, folder)

    def train(name: str) -> Path:
        # Different answers and many steps, so that the adapters differ on any machine.
        data = write_dialogues(folder / f"{name}.json", ["What are you?", f"{name} " * 6])
        return run(name, "--data_path", data, "--learning_rate", "5e-2", "--max_steps", "12")

    return [train(name) for name in NAMES]


@pytest.fixture(scope="module")
def alone(folders: list[Path]) -> dict[str, str]:
    """Return the answers of each adapter, loaded without the other one, and of the base."""
    answers = {}
    for folder in folders:
        speaker = load_speaker(ChatConfig(adapter=(str(folder),), max_new_tokens=12))
        answers[folder.name] = printed(speaker.answer(QUESTION))
        answers[BASE] = printed(speaker.answer(QUESTION, BASE))
    assert len({*answers.values()}) == 3, answers
    return answers


@pytest.fixture
def speaker(folders: list[Path]) -> Speaker:
    return load_speaker(ChatConfig(adapter=tuple(map(str, folders)), max_new_tokens=12))


def test_an_adapter_answers_the_same_whether_or_not_others_are_loaded(
    speaker: Speaker, alone: dict[str, str]
) -> None:
    # After switches to and from another adapter, the answers are the same.
    for name in ("fox", "owl", BASE, "fox", BASE, "owl"):
        assert printed(speaker.answer(QUESTION, name)) == alone[name]
    assert printed(speaker.answer(QUESTION)) == alone["fox"]


def test_the_system_prompt_and_all_previous_turns_reach_the_model(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, prompts = speaker.adapters["fox"].tokenizer, []
    generate = speaker.model.generate

    def watched(**inputs: object) -> object:
        prompts.append(tokenizer.decode(inputs["input_ids"][0]))  # type: ignore[index]
        return generate(**inputs)

    monkeypatch.setattr(speaker.model, "generate", watched)
    turns = (*QUESTION, Turn("assistant", "A small fox."), Turn("user", "And then?"))
    speaker.answer(turns, system="Be very brief.")
    places = [prompts[0].find(text) for text in ("Be very brief.", "are you", "fox", "And then")]
    assert -1 < places[0] < places[1] < places[2] < places[3]
    speaker.answer(turns)
    assert "Be very brief." not in prompts[1]


def test_commands_of_a_dialogue_switch_adapters_and_start_a_new_dialogue(
    folders: list[Path],
    alone: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = [
        "What are you?",
        "/clear",
        "/adapter owl",
        "What are you?",
        "/adapter ow",
        "/quit",
        "Not read",
    ]
    lines: Iterator[str] = iter(typed)

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    chat.main(["--adapter", *map(str, folders), "--max_new_tokens", "12"])
    output = capsys.readouterr().out
    first, second = output.split("owl answers")
    assert f"fox: {alone['fox']}" in first.replace("fox:  ", "fox: ")
    assert f"owl: {alone['owl']}" in second.replace("owl:  ", "owl: ")
    assert "Did you mean owl?" in output
    assert next(lines) == "Not read"
    assert first.count("(truncated at --max_new_tokens)") == 1


def test_the_model_answers_after_the_results_of_all_its_calls(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter(["/result early", "Two cities?", "/result sunny", "/result cold", "/result late"])
    calls = (ToolCall("weather", {"city": "Rome"}), ToolCall("weather", {"city": "Oslo"}))
    answers = iter([Turn("assistant", "", calls=calls), Turn("assistant", "Sunny and cold.")])
    asked: list[tuple[Turn, ...]] = []

    def answer(_: Speaker, turns: tuple[Turn, ...], *_more: object) -> Turn:
        asked.append(turns)
        return next(answers)

    monkeypatch.setattr("builtins.input", lambda _: next(typed, "/quit"))
    monkeypatch.setattr(chat, "print_answer", answer)
    chat.main(["--adapter", str(folders[0])])
    assert len(asked) == 2
    results = [(turn.text, turn.name) for turn in asked[1] if turn.role == "tool"]
    assert results == [("sunny", "weather"), ("cold", "weather")]
    assert capsys.readouterr().out.count("found no tool call without a result.") == 2


def test_a_file_of_questions_becomes_a_file_of_answers(
    folders: list[Path],
    alone: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    asked = {"id": "q7", "prompt": "What are you?"}
    file.write_text(json.dumps(asked) + "\n\n" + json.dumps({"prompt": "And?", "system": "Hm."}))
    flags = ["--adapter", *map(str, folders), "--max_new_tokens", "12", "--prompts", str(file)]
    chat.main([*flags, "--out", str(out), "--compare"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["q7"] * 3 + [3] * 3
    assert [line["adapter"] for line in lines] == [BASE, "fox", "owl"] * 2
    assert [line["answer"] for line in lines[:3]] == [alone[name] for name in (BASE, *NAMES)]
    chat.main([*flags, "--out", str(out)])
    (first, second) = map(json.loads, out.read_text().splitlines())
    assert first == {**asked, "adapter": "fox", "answer": alone["fox"]}
    assert second["id"] == 3
    assert second["system"] == "Hm."
    chat.main([*flags, "--out", str(out), "--system", "Be brief."])
    systems = [json.loads(line)["system"] for line in out.read_text().splitlines()]
    assert systems == ["Be brief.", "Hm."]  # The question's system prompt takes precedence.
    chat.main([*flags[:5], "--prompt", "What are you?", "--compare"])
    table = capsys.readouterr().out
    assert "> What are you?\nBASE" in table
    header = table.split("\nBASE")[1].splitlines()[0]
    assert [name.strip() for name in header.split("|")] == ["", *NAMES]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "Hi"}\n{"prompt": ', "line 2: not valid JSON"),
        ("a.jsonl", '{"question": "Hi"}', 'line 1: found {"question": "Hi"}; expected an object'),
        ("a.jsonl", '{"prompt": "Hi", "system": 3}', "line 1: found"),
        ("a.txt", " \n", "found an empty file"),
        ("none.txt", None, "cannot be read: No such file"),
    ],
)
def test_an_invalid_question_is_refused_with_its_line_number(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


def test_contradictory_flags_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Hi\n")
    for flags, message in {
        ("--prompts", str(file)): "expected both",
        ("--prompts", str(file), "--out", "o", "--prompt", "Hi"): "expected one of them",
        ("--prompts", str(file), "--out", str(file)): "the path is --prompts",
    }.items():
        with pytest.raises(UserError, match=message):
            chat.main(flags)


def test_adapters_of_two_bases_are_refused(
    tiny_model: Path, train: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "other")
    one, two = train("one"), train("two", "--model_name_or_path", tmp_path / "other")
    with pytest.raises(UserError, match="expected the first adapter's base"):
        load_speaker(ChatConfig(adapter=(str(one), str(two))))
    load_speaker(ChatConfig(adapter=(str(one), str(two)), base=str(tiny_model)))
