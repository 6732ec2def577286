"""`python -m data look` prints in ten lines what a file holds, and refuses what cannot be read."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.preparation.look import main
from tests.support.helpers import ROOT

NAMES = [
    *("container", "form", "records", "fields", "turns"),
    *("systems", "tools", "reasoning", "first", "dropped"),
]


def saved(tmp_path: Path, *records: Any) -> Path:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.fixture
def rows(capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that looks at a file and returns its ten lines by name."""

    def looked(*words: str | Path) -> dict[str, str]:
        main([*map(str, words)])
        lines = capsys.readouterr().out.splitlines()
        found = {line[:10].strip(): line[11:] for line in lines}
        assert [*found] == NAMES
        assert len(lines) == 10
        return found

    return looked


def chat(*texts: str, **keys: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"messages": messages, **keys}


CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Brest"}}}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}
WITH_TOOLS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How high is the tide?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "4.2"},
        {"role": "assistant", "content": "4.2 m.", "reasoning_content": "Metres."},
    ],
    "tools": [TOOL],
}


def test_the_counts_are_those_of_the_file(rows: Any, tmp_path: Path) -> None:
    file = saved(tmp_path, chat("Hi", "Yo", "And?", "So."), WITH_TOOLS, chat("Hi", "Yo", topic="x"))
    found = rows(file)
    assert found["form"] == 'messages, by "messages"'
    assert found["records"] == "3 (all), 3 dialogues"
    assert found["container"].startswith(f"{file}: JSON Lines, ")
    assert "messages.role, messages.content" in found["fields"]
    assert "tools (1)" in found["fields"]
    assert found["fields"].endswith("unused: topic (1)")
    roles = "assistant 5, user 4, system 1, tool 1"
    assert found["turns"] == (
        f"10, 2 to 4 in each dialogue; roles: {roles}; 4 of 5 answers supervised"
    )
    assert found["systems"] == "in 1 of 3 dialogues, 1 different"
    assert found["tools"] == "defined in 1 of 3 dialogues (tide (1)); 1 call, 1 result"
    assert found["reasoning"] == "in 1 of 5 answers"
    assert found["first"] == "user: Hi | assistant: Yo | … 2 more"
    assert found["dropped"] == "none"


def test_what_would_be_dropped_is_counted_by_cause(rows: Any, tmp_path: Path) -> None:
    file = saved(tmp_path, chat("Hi", ""), chat("Hi", "Yo", id="b"), chat("Hi", "", id="c"), 7)
    found = rows(file)
    expected = "3 with --on_bad_record skip: empty value 2 [0, c], record is not an object 1 [3]"
    assert found["dropped"] == expected
    assert found["records"] == "4 (all), 1 dialogue"


def test_a_field_that_changes_what_is_learnt_is_marked(rows: Any, tmp_path: Path) -> None:
    found = rows(saved(tmp_path, chat("Hi", "Yo", documents=["a"], topic="x")))
    assert found["fields"].endswith("unused: documents, topic; documents may change what is learnt")


def test_a_file_without_a_dialogue_is_refused_as_training_refuses_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from data.dialogues.sharegpt import Tally, read_dialogues

    file = saved(tmp_path, {"a": "Hi", "b": "Yo"})
    with pytest.raises(UserError) as refused:
        main([str(file)])
    assert len(capsys.readouterr().out.splitlines()) == 10
    with pytest.raises(UserError) as training:
        [*read_dialogues([file], Tally())]
    assert str(refused.value) == str(training.value)


EXPORTS = {
    "ChatGPT": {
        "mapping": {
            "a": {"id": "a", "parent": None, "message": None, "children": ["b"]},
            "b": {
                "parent": "a",
                "message": {"author": {"role": "user"}, "content": {"parts": ["Hi"]}},
            },
            "c": {
                "parent": "b",
                "message": {"author": {"role": "assistant"}, "content": {"parts": ["Yo"]}},
            },
        },
        "current_node": "c",
    },
    "Claude": {
        "chat_messages": [
            {"sender": "human", "text": "Hi"},
            {"sender": "assistant", "text": "Yo"},
        ]
    },
    "OASST": {
        "prompt": {
            "role": "prompter",
            "text": "Hi",
            "replies": [{"role": "assistant", "text": "Yo"}],
        }
    },
    "Slack": {"type": "message", "user": "U1", "ts": "1.0", "text": "Hi"},
    "Discord": {
        "guild": {},
        "channel": {"id": "1"},
        "messages": [
            {"content": "Hi", "author": {"name": "ann"}},
            {"content": "Yo", "author": {"name": "bot", "isBot": True}},
        ],
    },
}


@pytest.mark.parametrize("name", EXPORTS)
def test_the_command_named_for_an_export_makes_what_training_reads(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from data.preparation.convert import main as convert
    from tests.support.helpers import dialogues_in

    records = [EXPORTS[name]]
    if name == "Slack":
        records.append({**records[0], "user": "U2", "ts": "2.0", "text": "Yo", "bot_id": "B"})
    file = tmp_path / "it's.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError) as refused:
        main([str(file)])
    form = capsys.readouterr().out.splitlines()[1]
    assert form.startswith(f"form       {name} ")
    monkeypatch.chdir(tmp_path)
    found = re.search(r"python -m data convert --in .* --out data\.jsonl", str(refused.value))
    assert found
    command = found[0]
    convert([*shlex.split(command)[4:], "--processes", "1"])
    (dialogue,), _ = dialogues_in(tmp_path / "data.jsonl")
    assert [turn.text for turn in dialogue.turns] == ["Hi", "Yo"]


def test_of_a_long_file_the_first_records_are_counted_and_this_is_shown(
    rows: Any, tmp_path: Path
) -> None:
    file = saved(tmp_path, *[chat("Hi", "Yo")] * 30)
    assert rows(file, "--records", "20")["records"] == "20 (the first), 20 dialogues"
    assert rows(file, "--records", "30")["records"] == "30 (all), 30 dialogues"


def test_control_characters_are_escaped(rows: Any, tmp_path: Path) -> None:
    text = "\x1b[2J a\nb \u202e c \x07"
    found = rows(saved(tmp_path, chat(text, "Yo", **{"k\x1b": 1})))
    assert found["first"] == r"user: \x1b[2J a\nb \u202e c \x07 | assistant: Yo"
    assert r"unused: k\x1b" in found["fields"]


def test_a_key_with_a_control_character_is_escaped_in_an_error(tmp_path: Path) -> None:
    file = saved(tmp_path, {"k\x1b]0;x\x07": "Hi"})
    command = [sys.executable, "-m", "data", "look", str(file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert "\x1b" not in ended.stderr + ended.stdout
    assert r"k\x1b]0;x\x07" in ended.stderr


def test_look_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    file = saved(tmp_path, chat("Hi", "Yo"), WITH_TOOLS)
    code = (
        "import sys; from data.preparation.look import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'pandas', 'datasets', 'pyarrow'} & {*sys.modules}; "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    command = [sys.executable, "-c", code, str(file)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_the_documented_output_is_the_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/preparation.md").read_text(encoding="utf-8")
    shown = page.partition("python -m data look data/dummy_conversation.json\n```\n\n```text\n")[2]
    main(["data/dummy_conversation.json"])
    assert capsys.readouterr().out == shown.partition("```")[0]
