"""Exports of ChatGPT, Claude, Slack and Discord become dialogues; what is left out is counted."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from data.files.json_loose import LARGEST
from data.preparation.convert import main
from tests.support.helpers import ROOT, dialogues_in

Records = list[dict[str, Any]]


def converted(tmp_path: Path, source: Path, *flags: str) -> tuple[Records, dict[str, Any]]:
    """Return the written records and the report."""
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    words = ["--in", source, "--out", out, "--report", report, "--processes", "1", *flags]
    main([*map(str, words)])
    account = json.loads(report.read_text())
    dropped = sum(n if isinstance(n, int) else len(n) for n in account["dropped"].values())
    assert account["read"] == account["kept"] + dropped
    lines = out.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines], account


def saved(file: Path, value: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def texts(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["from"], turn["value"]) for turn in record["conversations"]]


def node(name: str, parent: str | None, role: str, *parts: Any, **message: Any) -> dict[str, Any]:
    """Return a node of ChatGPT's mapping; its children are added by `chatgpt`."""
    content = {"content_type": "text", "parts": [*parts]}
    given = {"id": name, "author": {"role": role}, "content": content, "recipient": "all"}
    return {"id": name, "parent": parent, "children": [], "message": {**given, **message}}


def chatgpt(*nodes: dict[str, Any], current: str | None) -> dict[str, Any]:
    mapping = {"root": {"id": "root", "parent": None, "children": [], "message": None}}
    mapping |= {one["id"]: one for one in nodes}
    for one in nodes:
        mapping[one["parent"]]["children"].append(one["id"])
    return {"title": "T", "conversation_id": "c", "mapping": mapping, "current_node": current}


HIDDEN = {"metadata": {"is_visually_hidden_from_conversation": True}}
IMAGE = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://x"}
EDITED = (
    node("s", "root", "system", "", **HIDDEN),
    node("u0", "s", "user", "Which moon is big?"),
    node("a0", "u0", "assistant", "Which planet?"),
    node("u1", "s", "user", "Which moon is largest?", IMAGE),
    node("a1", "u1", "assistant", "Ganymede\ue200cite\ue202turn0\ue201, of Jupiter【4†source】."),
)


def test_a_chatgpt_conversation_is_the_path_to_its_current_node(tmp_path: Path) -> None:
    file = saved(tmp_path / "conversations.json", [chatgpt(*EDITED, current="a1")])
    (record,), account = converted(tmp_path, file)
    expected = [("human", "Which moon is largest?"), ("gpt", "Ganymede, of Jupiter.")]
    assert texts(record) == expected
    assert record["id"] == "c"
    assert account["noted"] == {
        "citation mark left out": 2,
        "image left out": 1,
        "message of another branch left out": 2,
    }
    other = saved(tmp_path / "other.json", [chatgpt(*EDITED, current="a0")])
    assert texts(converted(tmp_path, other)[0][0])[1] == ("gpt", "Which planet?")


def test_without_a_current_node_the_newest_branch_of_chatgpt_is_taken(tmp_path: Path) -> None:
    nodes = [{**one, "message": {**one["message"], "create_time": n}} for n, one in
             enumerate(EDITED)]  # fmt: skip
    for current in (None, "gone"):
        file = saved(tmp_path / "a.json", [chatgpt(*nodes, current=current)])
        assert texts(converted(tmp_path, file)[0][0])[0] == ("human", "Which moon is largest?")


def test_tools_hidden_messages_and_reasoning_of_chatgpt_are_told_apart(tmp_path: Path) -> None:
    thoughts = {"content_type": "thoughts", "thoughts": [{"summary": "s", "content": "Count."}]}
    about = {"content_type": "user_editable_context", "user_instructions": "Be brief."}
    code = {"content_type": "code", "text": "1 + 1"}
    nodes = (
        node("s", "root", "system", "You are a tutor."),
        node("i", "s", "user", content=about, **HIDDEN),
        node("u", "i", "user", "1 + 1?"),
        node("t", "u", "assistant", content=thoughts),
        node("c", "t", "assistant", content=code, recipient="python"),
        node("r", "c", "tool", content={"content_type": "execution_output", "text": "2"}),
        node("a", "r", "assistant", "It is"),
        node("b", "a", "assistant", "two."),
        node("m", "b", "system", "Memory changed."),
        node("v", "m", "user", "And 2 + 2?"),
        node("w", "v", "assistant", "Fo", metadata={"finish_details": {"type": "interrupted"}}),
    )
    (record,), account = converted(
        tmp_path, saved(tmp_path / "a.json", [chatgpt(*nodes, current="w")])
    )
    assert record["conversations"] == [
        {"from": "system", "value": "You are a tutor."},
        {"from": "human", "value": "1 + 1?"},
        {"from": "gpt", "value": "It is\ntwo.", "reasoning": "Count."},
        {"from": "human", "value": "And 2 + 2?"},
        {"from": "gpt", "value": "Fo", "train": False},
    ]
    assert account["noted"] == {
        "answer broken off, not trained": 1,
        "consecutive messages joined": 1,
        "custom instructions left out": 1,
        "system message left out": 1,
        "tool call left out": 1,
        "tool result left out": 1,
    }


def test_a_circle_of_chatgpt_nodes_ends_and_a_chat_without_an_answer_is_dropped(
    tmp_path: Path,
) -> None:
    circle = chatgpt(*EDITED[:2], current="u0")
    circle["mapping"]["s"]["parent"] = "u0"
    empty = {"id": "e", "mapping": {}, "current_node": None}
    odd = {"id": "o", "mapping": {"x": None, "y": {"message": {"author": None}}}}
    odd["current_node"] = "y"
    records, account = converted(
        tmp_path, saved(tmp_path / "a.json", [circle, empty, odd]), "--on_bad_record", "skip"
    )
    assert records == []
    assert account["dropped"] == {
        "no question with an answer": ["c", "e"],
        "unknown role": ["2"],
    }


def test_files_beside_the_conversations_of_an_export_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "export"
    saved(folder / "conversations.json", [chatgpt(*EDITED, current="a1")])
    saved(folder / "user.json", {"id": "user-1", "email": "a@b.c"})
    saved(folder / "message_feedback.json", [{"id": "f", "rating": "thumbs_up"}])
    records, _ = converted(tmp_path, folder)
    assert len(records) == 1
    assert "message_feedback.json, user.json" in capsys.readouterr().err


def claude(*messages: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"uuid": "u", "name": "Moons", "chat_messages": [*messages], **keys}


def said(uuid: str, sender: str, text: str, **keys: Any) -> dict[str, Any]:
    return {"uuid": uuid, "sender": sender, "text": text, "content": [], **keys}


def test_claudes_text_blocks_and_thinking_are_an_answer(tmp_path: Path) -> None:
    unsupported = "```\nThis block is not supported on your current device yet.\n```"
    blocks = [
        {"type": "thinking", "thinking": "Jupiter's."},
        {"type": "text", "text": "I search."},
        {"type": "tool_use", "name": "web_search", "input": {}},
        {"type": "tool_result", "name": "web_search", "content": []},
        {"type": "text", "text": "Ganymede."},
    ]
    chat = claude(
        said("1", "human", "Which moon is largest?", attachments=[{"file_name": "a.txt"}]),
        said("2", "assistant", "rendered differently", content=blocks),
        said("3", "human", "Sure?"),
        said("4", "assistant", f"{unsupported}\nYes."),
    )
    (record,), account = converted(tmp_path, saved(tmp_path / "a.json", [chat]))
    assert record["conversations"] == [
        {"from": "human", "value": "Which moon is largest?"},
        {"from": "gpt", "value": "I search.\nGanymede.", "reasoning": "Jupiter's."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    assert account["noted"] == {
        "attachment left out": 1,
        "tool result left out": 1,
        "tool use left out": 2,
    }


def test_an_edited_chat_of_claude_is_the_path_to_its_last_message(tmp_path: Path) -> None:
    chat = claude(
        said("1", "human", "Hi", parent_message_uuid="00000000-0000-4000-8000-000000000000"),
        said("2", "assistant", "Hello", parent_message_uuid="1"),
        said("3", "human", "first wording", parent_message_uuid="2"),
        said("4", "assistant", "first answer", parent_message_uuid="3"),
        said("5", "human", "second wording", parent_message_uuid="2"),
        said("6", "assistant", "second answer", parent_message_uuid="5"),
    )
    (record,), account = converted(tmp_path, saved(tmp_path / "a.json", [chat]))
    assert [text for _, text in texts(record)] == ["Hi", "Hello", "second wording", "second answer"]
    assert account["noted"] == {"message of another branch left out": 2}


def test_a_chat_of_claude_with_an_unknown_sender_is_named(tmp_path: Path) -> None:
    chat = claude(said("1", "robot", "Hi"))
    with pytest.raises(UserError, match="found the sender robot; expected human or assistant"):
        converted(tmp_path, saved(tmp_path / "a.json", [chat]))


def slack(user: str, ts: float, text: str | None, **keys: Any) -> dict[str, Any]:
    return {"type": "message", "user": user, "ts": f"{ts:.6f}", "text": text, **keys}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A Slack export with a channel, a thread over two days, and a bot."""
    folder = tmp_path / "slack"
    saved(folder / "channels.json", [{"id": "C1", "name": "general", "members": ["U1"]}])
    saved(
        folder / "users.json",
        [
            {"id": "U1", "name": "ann", "profile": {"display_name": "Ann"}},
            {"id": "U2", "name": "ben", "profile": {"display_name": "Ben"}},
            {"id": "U3", "name": "helper", "is_bot": True, "profile": {"bot_id": "B1"}},
        ],
    )
    first = [
        slack("U1", 100, None, subtype="channel_join"),
        slack("U1", 200, "<@U3> is the ferry &lt;F1&gt; running?", reactions=[{"name": "eyes"}]),
        slack("U2", 210, "See <https://f.example|the page>."),
        slack("U3", 220, "Yes, hourly.", bot_id="B1"),
        slack("U1", 300, "What does it cost?", thread_ts="300.000000", files=[{"id": "F"}]),
        slack("U2", 310, "Hello all"),
        slack("U3", 9000, "Good morning.", bot_id="B1"),
    ]
    second = [
        slack("U3", 90000, "Three euros.", bot_id="B1", thread_ts="300.000000"),
        slack("U3", 90010, "Children go free.", bot_id="B1", thread_ts="300.000000"),
    ]
    saved(folder / "general" / "2024-01-01.json", first)
    saved(folder / "general" / "2024-01-02.json", second)
    return folder


def test_threads_and_pauses_cut_a_slack_channel(workspace: Path, tmp_path: Path) -> None:
    records, account = converted(tmp_path, workspace)
    assert {record["id"]: texts(record) for record in records} == {
        "general/100": [
            (
                "human",
                "@helper is the ferry <F1> running?\nSee [the page](https://f.example).",
            ),
            ("gpt", "Yes, hourly."),
        ],
        "general/300.000000": [
            ("human", "What does it cost?"),
            ("gpt", "Three euros.\nChildren go free."),
        ],
    }
    assert account["dropped"] == {"no question with an answer": ["general/9000"]}
    assert account["noted"] == {
        "consecutive messages joined": 2,
        "file left out": 1,
        "question without an answer left out": 1,
        "reaction left out": 1,
        "system message (channel_join) left out": 1,
        "turn of several users": 1,
    }
    longer, _ = converted(tmp_path, workspace, "--pause", "600")
    first = texts(longer[0])
    assert first[2:] == [("human", "Hello all"), ("gpt", "Good morning.")]


@pytest.mark.parametrize("name", ["Ben", "ben", "U2", "@ben"])
def test_a_speaker_of_slack_is_the_assistant_by_any_name(
    name: str, workspace: Path, tmp_path: Path
) -> None:
    (record,), _ = converted(tmp_path, workspace, "--assistant", name)
    assert texts(record)[1] == ("gpt", "See [the page](https://f.example).")


def test_without_one_bot_the_error_lists_the_speakers_and_a_command_that_works(
    workspace: Path, tmp_path: Path
) -> None:
    file = workspace / "general" / "2024-01-02.json"
    saved(file, [slack("U9", 90000, "Hi", bot_id="B9", username="other bot")])
    with pytest.raises(UserError, match=r"found 2 bots; expected --assistant") as error:
        converted(tmp_path, workspace)
    message, command = str(error.value).split("\n")
    assert "Ann (2), Ben (2), helper (2), other bot (1)" in message
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "data", "convert"]
    main([*words[4:], "--processes", "1"])
    dialogues, _ = dialogues_in(tmp_path / "out.jsonl")
    assert [turn.text for turn in dialogues[0].turns][1] == "Yes, hourly."
    with pytest.raises(UserError, match="--assistant zoe: no speaker has this name or id"):
        converted(tmp_path, workspace, "--assistant", "zoe")


def test_a_zip_of_slack_is_read_with_channels_of_any_name(workspace: Path, tmp_path: Path) -> None:
    """Elsewhere, folders named dev or test are the parts of a data set."""
    (workspace / "general").rename(workspace / "dev")
    (workspace / "train").mkdir()
    saved(workspace / "train" / "2024-01-01.json", [slack("U1", 1, "Which train?")])
    file = Path(shutil.make_archive(str(tmp_path / "export"), "zip", workspace))
    for source in (file, workspace):
        records, account = converted(tmp_path, source)
        assert [record["id"] for record in records] == ["dev/100", "dev/300.000000"]
        assert texts(records[0])[0][1].startswith("@helper is the ferry")
        assert account["read"] == 4


def discord(**keys: Any) -> dict[str, Any]:
    return {"guild": {"id": "1", "name": "G"}, "channel": {"id": "2", "name": "help"}, **keys}


def posted(name: str, minute: int, text: str, **keys: Any) -> dict[str, Any]:
    author = {"id": f"id-{name}", "name": name, "nickname": name.title(), "isBot": name == "bot"}
    time = f"2024-01-01T10:{minute:02}:00.1234567+00:00"
    return {"type": "Default", "content": text, "author": author, "timestamp": time, **keys}


def test_a_discord_channel_is_its_users_and_its_bot(tmp_path: Path) -> None:
    messages = [
        posted("ann", 0, "", type="GuildMemberJoin"),
        posted("ann", 1, "Is the ferry running?", attachments=[{"id": "a"}]),
        posted("bot", 2, "Yes,", type="Reply", reactions=[{"emoji": {}, "count": 2}]),
        posted("bot", 3, "hourly."),
        posted("bot", 4, "", embeds=[{"title": "t"}]),
        posted("ben", 5, "Thanks"),
    ]
    file = saved(tmp_path / "a.json", discord(messages=messages, messageCount=6))
    (record,), account = converted(tmp_path, file)
    assert texts(record) == [("human", "Is the ferry running?"), ("gpt", "Yes,\nhourly.")]
    assert account["noted"] == {
        "attachment left out": 1,
        "consecutive messages joined": 1,
        "embed left out": 1,
        "message without text left out": 1,
        "question without an answer left out": 1,
        "reaction left out": 1,
        "system message (GuildMemberJoin) left out": 1,
    }
    (by_name,), _ = converted(tmp_path, file, "--assistant", "Ben")
    assert texts(by_name)[-1] == ("gpt", "Thanks")


def test_a_discord_file_larger_than_a_record_may_be_is_read_in_constant_memory(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.json"
    head, tail = json.dumps(discord(messages=[0]), indent=2).split("0\n")
    with file.open("w") as opened:
        opened.write(head)
        for number in range(20_000):
            name, text = (("ann", "question "), ("bot", "answer "))[number % 2]
            time = f"2024-01-{1 + number // 1440:02}T{number // 60 % 24:02}:{number % 60:02}:00Z"
            message = posted(name, 0, text * 100, timestamp=time)
            opened.write(",\n" * bool(number) + json.dumps(message, indent=1))
        opened.write(tail)
    assert file.stat().st_size > 2 * LARGEST
    code = (
        "import re, sys; from data.preparation.convert import main; main(sys.argv[1:]); "
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    words = ["--in", file, "--out", tmp_path / "out.jsonl", "--processes", "1"]
    command = [sys.executable, "-c", code, *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "read 10 = kept 10" in ended.stderr  # a dialogue has at most 2,000 messages
    assert int(ended.stdout) < 100_000  # KiB, of which the imports take 30,000


def test_an_invalid_message_of_a_channel_is_named_or_counted(tmp_path: Path) -> None:
    messages = [posted("ann", 1, "Hi"), {"content": "?"}, posted("bot", 2, "Hello")]
    file = saved(tmp_path / "a.json", discord(messages=messages))
    with pytest.raises(UserError, match=r'a\.json: message 1: a message has no "author"'):
        converted(tmp_path, file)
    (record,), account = converted(tmp_path, file, "--on_bad_record", "skip")
    assert texts(record) == [("human", "Hi"), ("gpt", "Hello")]
    assert account["noted"] == {"message left out (not a message)": 1}


def test_assistant_needs_an_export_of_channels(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.json", [claude(said("1", "human", "Hi"))])
    with pytest.raises(UserError, match="--assistant: only Slack and Discord exports need it"):
        converted(tmp_path, file, "--assistant", "ann")


def test_the_documented_command_converts_a_slack_export(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/preparation.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if re.match("python -m data .*--assistant", line)]
    monkeypatch.chdir(tmp_path)
    workspace.rename("slack_export")
    main([*shlex.split(line)[4:], "--processes", "1"])
    assert len((tmp_path / "dialogues.jsonl").read_text().splitlines()) == 2
