"""Known dialogue formats are converted to ShareGPT; other records are named or counted."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.forms import as_sharegpt
from data.dialogues.turns import ROLES, turn_roles
from data.errors import BadRecord, UserError
from data.preparation.convert import main
from tests.support.helpers import dialogues_in


def texts(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["from"], turn["value"]) for turn in record["conversations"]]


def written(tmp_path: Path, name: str, *records: Any) -> Path:
    file = tmp_path / name
    file.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return file


def converted(tmp_path: Path, *words: str | Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the written records and the report."""
    out, report = tmp_path / "out.jsonl", tmp_path / "report.json"
    main([str(w) for w in (*words, "--out", out, "--report", report, "--processes", "1")])
    account = json.loads(report.read_text())
    dropped = sum(n if isinstance(n, int) else len(n) for n in account["dropped"].values())
    assert account["read"] == account["kept"] + dropped
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(records) == account["kept"]
    return records, account


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def test_a_sharegpt_record_is_returned_itself() -> None:
    record = {"id": "a", "conversations": [{"from": "human", "value": "Hi"}], "model": "m"}
    assert as_sharegpt(record) is record


def test_role_and_content_become_from_and_value_and_other_keys_stay() -> None:
    record = {"conversations": CHAT, "model": "m"}
    assert texts(as_sharegpt(record)) == [("human", "Hi"), ("gpt", "Yo")]
    assert as_sharegpt(record)["model"] == "m"


def test_messages_keep_weights_parts_tools_and_their_calls() -> None:
    call = {"type": "function", "function": {"name": "sum", "arguments": '{"a": 1, "b": "é"}'}}
    broken = {"type": "function", "function": {"name": "sum", "arguments": "{a"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call, broken], "weight": 0},
        {"role": "tool", "content": "2", "tool_call_id": "x"},
        {"role": "assistant", "content": "Two.", "tool_calls": [call], "train": False},
    ]
    made = as_sharegpt({"messages": messages, "tools": [{"name": "sum"}], "id": 7})
    first, second = (one["function"] for one in (call, broken))
    assert made == {
        "id": 7,
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "1+1"},
            {"from": "gpt", "value": "", "tool_calls": [first, second], "weight": 0},
            {"from": "tool", "value": "2", "tool_call_id": "x"},
            {"from": "gpt", "value": "Two.", "tool_calls": [first], "train": False},
        ],
        "tools": [{"type": "function", "function": {"name": "sum"}}],
    }


def test_an_alpaca_record_is_its_system_history_question_and_answer() -> None:
    record = {
        "instruction": "Add.",
        "input": "1 1",
        "output": "2",
        "system": "Be brief.",
        "history": [["Hi", "Yo"]],
        "source": "s",
    }
    made = as_sharegpt(record)
    assert texts(made) == [
        ("system", "Be brief."),
        ("human", "Hi"),
        ("gpt", "Yo"),
        ("human", "Add.\nInput:\n1 1"),
        ("gpt", "2"),
    ]
    assert {*made} == {"conversations", "source"}
    assert texts(as_sharegpt({"instruction": "Add.", "input": "", "output": "2"}))[0][1] == "Add."


BAD = {
    "a number": (7, "record is not an object", "found a number"),
    "other keys": ({"text": "Hi"}, "text without roles", "found the keys text"),
    "no keys": ({}, "unknown format", "found no keys"),
    "no list": ({"messages": "Hi"}, "no messages", "is a string"),
    "no turns": ({"conversations": []}, "no turns", "is empty"),
    "no role": ({"messages": [{"content": "Hi"}]}, "unknown role", "turn 0 has no role"),
    "a role": ({"messages": [{"role": "Zed"}]}, "unknown role", 'turn 0 has the role "Zed"'),
    "null": ({"messages": [{"role": "user", "content": None}]}, "value is not text", "is null"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]},
        "part is not text",
        "turn 0 has a part 'image_url'",
    ),
    "a call": (
        {"messages": [{"role": "assistant", "tool_calls": [1]}]},
        "invalid tool call",
        "turn 0: a tool call is a number",
    ),
    "calls": ({"messages": [{"role": "user", "tool_calls": 1}]}, "invalid tool call", "a number"),
    "history": (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        "history is not pairs",
        "history 0 is a list",
    ),
    "output": ({"instruction": "a", "output": 7}, "value is not text", '"output" is a number'),
    "value": ({"conversations": [{"from": "human"}]}, "value is not text", 'no "value"'),
    "surrogate": (
        {"conversations": [{"from": "human", "value": "\ud800"}]},
        "lone surrogate",
        "turn 0",
    ),
}


@pytest.mark.parametrize("record, cause, found", BAD.values(), ids=BAD)  # noqa: PT006
def test_a_record_of_an_unknown_format_is_named(record: Any, cause: str, found: str) -> None:
    with pytest.raises(BadRecord, match=found) as error:
        turn_roles(as_sharegpt(record))
    assert error.value.cause == cause


def test_every_role_name_is_accepted() -> None:
    turns = [{"from": name, "value": "x"} for name in ROLES]
    assert turn_roles({"conversations": turns}) == [*ROLES.values()]


def test_a_bad_record_stops_the_run_or_is_counted(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", {"messages": CHAT}, {"text": "Hi"}, {"messages": CHAT})
    with pytest.raises(UserError, match=r"record 1: found the keys text; expected"):
        converted(tmp_path, "--in", file)
    records, account = converted(tmp_path, "--in", file, "--on_bad_record", "skip")
    assert len(records) == 2
    assert account["dropped"] == {"text without roles": ["1"]}


def message(role: str, text: str, *replies: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": [*replies], **keys}


TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": message(
        "prompter",
        "q",
        message("assistant", "worse", rank=1),
        message("assistant", "unranked", message("prompter", "unanswered")),
        message(
            "assistant",
            "best",
            message("prompter", "and?", message("assistant", "gone", deleted=True), rank=1),
            message("prompter", "so?", message("assistant", "so."), rank=0),
            rank=0,
        ),
        lang="en",
    ),
}


def test_the_best_path_of_a_tree_follows_the_ranks(tmp_path: Path) -> None:
    (record,), _ = converted(tmp_path, "--in", written(tmp_path, "a.jsonl", TREE))
    expected = [("human", "q"), ("gpt", "best"), ("human", "so?"), ("gpt", "so.")]
    assert texts(record) == expected
    assert (record["id"], record["lang"]) == ("t_0", "en")


def test_all_paths_of_a_tree_end_with_each_last_answer(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", TREE)
    flags = ("--format", "oasst", "--oasst_paths", "all")
    records, _ = converted(tmp_path, "--in", file, *flags)
    last = [texts(record)[-1][1] for record in records]
    assert last == ["so.", "worse", "unranked"]
    assert [record["id"] for record in records] == ["t_0", "t_1", "t_2"]


def test_a_tree_without_an_answer_is_counted_and_an_invalid_one_named(tmp_path: Path) -> None:
    alone = {"message_tree_id": "t", "prompt": message("prompter", "q")}
    gone = {"message_tree_id": "u", "prompt": message("prompter", "q", deleted=True)}
    for paths in ("best", "all"):
        flags = ("--oasst_paths", paths, "--in", written(tmp_path, "a.jsonl", alone, gone))
        _, account = converted(tmp_path, *flags)
        assert account["dropped"] == {"no answer": ["t", "u"]}
    wrong = {"prompt": message("prompter", "q", message("prompter", "r"))}
    with pytest.raises(UserError, match="a reply has the same role"):
        converted(tmp_path, "--in", written(tmp_path, "b.jsonl", wrong))


def test_a_tree_deeper_than_the_interpreters_stack_is_read(tmp_path: Path) -> None:
    from data.preparation.oasst import from_tree

    tree = message("assistant", "end")
    for number in range(4001):
        tree = message("assistant" if number % 2 else "prompter", "x", tree)
    for paths in ("best", "all"):
        (record,) = from_tree({"prompt": tree}, "0", paths).records
        assert len(record["conversations"]) == 4002


COLUMNS = ("--columns", "user=question", "assistant=answer", "system=sys", "id=key")
ROWS = [
    {"key": "a", "question": "Hi", "answer": "Yo\nthere", "sys": "Be brief.", "source": "s"},
    {"key": "b", "question": "1", "answer": "2", "sys": "", "source": "s"},
]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "jsonl.gz", "parquet"])
def test_named_columns_of_any_table_become_dialogues(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"table.{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind == "csv":
        with file.open("w", newline="") as opened:
            table = csv.DictWriter(opened, [*ROWS[0]])
            table.writeheader()
            table.writerows(ROWS)
    elif kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    else:
        file.write_bytes(gzip.compress(lines.encode()) if kind == "jsonl.gz" else lines.encode())
    records, _ = converted(tmp_path, "--in", file, *COLUMNS)
    assert texts(records[0]) == [("system", "Be brief."), ("human", "Hi"), ("gpt", "Yo\nthere")]
    assert texts(records[1]) == [("human", "1"), ("gpt", "2")]
    assert [(record["id"], record["source"]) for record in records] == [("a", "s"), ("b", "s")]
    dialogues, _ = dialogues_in(tmp_path / "out.jsonl")
    assert [dialogue.id for dialogue in dialogues] == ["a", "b"]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", {"question": "Hi", "reply": "Yo"})
    flags = ("--columns", "user=question", "assistant=answer")
    with pytest.raises(UserError, match="found the columns question, reply; expected answer"):
        converted(tmp_path, "--in", file, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--format", "columns"),
        ("--columns", "user=a"),
        ("--columns", "user=a", "assistant="),
        ("--columns", "user=a", "assistant=b", "who=c"),
        ("--columns", "user=a", "assistant=b", "user=c"),
        ("--columns", "user=a", "assistant=b", "--format", "alpaca"),
    ],
)
def test_invalid_columns_are_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--columns"):
        converted(tmp_path, "--in", written(tmp_path, "a.jsonl", ROWS[0]), *flags)


def test_many_processes_write_the_output_of_one(tmp_path: Path) -> None:
    records = [{"messages": CHAT, "id": str(number)} for number in range(700)]
    file, out = written(tmp_path, "a.jsonl", *records), tmp_path / "many.jsonl"
    converted(tmp_path, "--in", file)
    main(["--in", str(file), "--out", str(out), "--processes", "2"])
    assert out.read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_the_counts_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, "a.jsonl", {"messages": CHAT}, 7)
    converted(tmp_path, "--in", file, "--on_bad_record", "skip")
    account = "read 2 = kept 1 + dropped 1 (record is not an object: 1)"
    assert account in capsys.readouterr().err
