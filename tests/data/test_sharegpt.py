"""Invalid records are named with their place or counted; no record is lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from tests.support.helpers import dialogues_in

GOOD = {
    "id": "a",
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
}


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"id": "bad", "conversations": [{"from": role, "value": text} for role, text in pairs]}


BAD = {
    "no conversations": ({"id": "bad", "text": "Hi"}, "found the keys id, text"),
    "no messages": ({"id": "bad", "messages": []}, '"messages" is empty'),
    "conversations is text": ({"id": "bad", "conversations": "Hi"}, "is a string"),
    "no turns": ({"id": "bad", "conversations": []}, "is empty"),
    "unknown role": (turns(("human", "Hi"), ("Zed", "Yo")), 'turn 1 has the role "Zed"'),
    "two questions": (turns(("human", "Hi"), ("human", "Hey")), 'turn 1 is "human"'),
    "empty value": (turns(("human", "Hi"), ("gpt", " \n")), 'turn 1: "value" is empty'),
    "number": (turns(("human", "Hi"), ("gpt", 42)), '"value" is a number'),
    "null": (turns(("human", None), ("gpt", "Yo")), '"value" is null'),
    "turn is text": ({"id": "bad", "conversations": ["Hi"]}, "turn 0 is a string"),
    "record is a list": ([GOOD], "found a list"),
    "lone surrogate": (turns(("human", "\ud83d"), ("gpt", "Yo")), "surrogate"),
    "answer alone": (turns(("gpt", "Yo")), "no human turn is left"),
    "system alone": (turns(("system", "Be brief.")), "no human turn is left"),
    "two systems": (turns(("system", "a"), ("system", "b"), ("human", "c")), 'turn 1 is "system"'),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_or_counted(name: str, suffix: str, tmp_path: Path) -> None:
    record, found = BAD[name]
    file = tmp_path / f"data.{suffix}"
    records = [GOOD, record, GOOD]
    lines = "\n".join(map(json.dumps, records))
    file.write_text(json.dumps(records) if suffix == "json" else lines)
    with pytest.raises(UserError) as error:
        dialogues_in(file)
    message = str(error.value)
    assert found in message
    assert f"{file}: record 1" in message
    assert 'id "bad"' in message or not isinstance(record, dict)
    assert "--on_bad_record skip" in message
    assert "\n" not in message

    dialogues, tally = dialogues_in(file, on_bad_record="skip")
    assert [dialogue.id for dialogue in dialogues] == ["a", "a"]
    assert (tally.read, tally.dropped.total()) == (3, 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ('[{"id": "a",\n  "conversations": oops}]', "line 2, column 20"),
        ('{"id": "a", "conversations": []}\n{"id":', "record 0"),
        ("[]", "no records"),
        ("[" * 100_000, "recursion"),
        ("[" + "1" * 5000 + "]", "digits"),
    ],
)
def test_a_broken_file_is_named_with_its_place(text: str, found: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(UserError, match=found) as error:
        dialogues_in(file)
    assert str(file) in str(error.value)


def test_a_broken_line_of_jsonl_is_named_with_line_and_column(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{json.dumps(GOOD)}\n\n{{"id": oops}}\n')
    with pytest.raises(UserError, match=r"record 1: line 3, column 8: not valid JSON"):
        dialogues_in(file)
    assert dialogues_in(file, "skip")[1].dropped == {"not valid JSON": 1}


def test_missing_files_folders_and_other_encodings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        dialogues_in(tmp_path / "none.json")
    with pytest.raises(UserError, match="a folder without data"):
        dialogues_in(tmp_path)
    (tmp_path / "latin.json").write_bytes(b'[\n"\xe9"]')
    with pytest.raises(UserError, match="line 2, column 2: the byte 0xe9 is not UTF-8"):
        dialogues_in(tmp_path / "latin.json")


def test_a_first_turn_that_is_not_human_is_skipped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([turns(("gpt", "Hello"), ("human", "Hi"), ("gpt", "Yo"))]))
    dialogues, tally = dialogues_in(file)
    assert [turn.text for turn in dialogues[0].turns] == ["Hi", "Yo"]
    assert tally.noted == {"first turn not human, skipped": 1}


def test_a_leading_system_turn_is_kept_and_others_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([turns(("system", "Be brief."), ("human", "Hi"), ("gpt", "Yo"))]))
    (dialogue,), tally = dialogues_in(file)
    assert (dialogue.system, len(dialogue.turns), tally.noted) == ("Be brief.", 2, {})
    file.write_text(json.dumps([turns(("human", "Hi"), ("system", "x"), ("gpt", "Yo"))]))
    with pytest.raises(UserError, match='turn 1 is "system" after "human"; expected "gpt"'):
        dialogues_in(file)


def test_ids_are_optional_and_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    record = {"conversations": GOOD["conversations"]}
    file.write_text(json.dumps([record, {**record, "id": 7}]), encoding="utf-8-sig")
    assert [dialogue.id for dialogue in dialogues_in(file)[0]] == ["0", "7"]


def test_jsonl_lines_may_hold_unicode_line_separators(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    record = json.dumps(turns(("human", "a\u2028b"), ("gpt", "c\u0085d")), ensure_ascii=False)
    file.write_text(record + "\n" + record, encoding="utf-8")
    assert len(dialogues_in(file)[0]) == 2


@pytest.mark.parametrize(
    ("text", "good", "causes"),
    [
        ("[{0},\n{0},\n", 2, {"breaks off": 1}),
        ("[{0},\n{0}\n", 2, {"breaks off": 1}),
        ('[{0},\n{{"id": "cut', 1, {"breaks off": 1}),
        ("[{0}]\n[{0}]", 2, {}),
        ("[{0} {0}]", 1, {"not valid JSON": 1}),
        ('[{0}, {{"id": nul, "x": [1]}}, {0}]', 2, {"not valid JSON": 1}),
        ('[{0}, {{"a": 1, "a": 2}}, {0}]', 2, {"not valid JSON": 1}),
        ("[{0}, " + "[" * 5000 + "]" * 5000 + ", {0}]", 2, {"not valid JSON": 1}),
        ("{0}\n{{\n{0}", 2, {"not valid JSON": 1}),
    ],
)
def test_complete_records_between_broken_ones_are_read(
    text: str, good: int, causes: dict[str, int], tmp_path: Path
) -> None:
    file = tmp_path / "data.json"
    file.write_text(text.format(json.dumps(GOOD)))
    dialogues, tally = dialogues_in(file, "skip")
    assert (len(dialogues), tally.dropped) == (good, causes)


def test_a_duplicate_key_takes_no_longer_than_other_errors(tmp_path: Path) -> None:
    doubled = ", ".join(f'"{n % 50_000}": 1' for n in range(100_000))
    file = tmp_path / "data.jsonl"
    file.write_text(f"{{{doubled}}}\n{json.dumps(GOOD)}\n")
    assert len(dialogues_in(file, "skip")[0]) == 1


def test_compressed_files_and_parquet_are_read_like_plain_files(tmp_path: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    raw = f"{json.dumps(GOOD)}\n".encode() * 3
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(raw))
    pq.write_table(pa.Table.from_pylist([GOOD] * 3), tmp_path / "c.parquet")
    dialogues, tally = dialogues_in(tmp_path)
    assert (len(dialogues), tally.read) == (9, 9)
    assert len({dialogue.turns for dialogue in dialogues}) == 1
