"""Each command names or counts invalid input, without a traceback and in bounded memory."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.dialogues.forms import as_sharegpt
from data.errors import BadRecord, RunError, UserError
from data.files.json_stream import CHUNK as CHUNK_OF_A_FILE
from data.files.json_stream import DEEPEST, LARGEST
from data.files.read import read_records
from data.preparation import clean, convert, split, stats
from data.preparation.parallel import CHUNK, IN_FLIGHT, LARGE, characters, chunks, in_order
from tests.support.helpers import dialogues_in

QUESTION = {"from": "human", "value": "How far away is the moon?"}
GOOD = {"conversations": [QUESTION, {"from": "gpt", "value": "About 384,400 kilometres."}]}
LINE = json.dumps(GOOD).encode()


def answer(value: Any) -> bytes:
    turns = [QUESTION, {"from": "gpt", "value": value}]
    return json.dumps({"conversations": turns}).encode()


def nested(levels: int) -> bytes:
    inner = levels - 1  # the record itself is one level
    return LINE[:-1] + b', "x": ' + b"[" * inner + b"]" * inner + b"}"


PRIVATE = "".join(
    map(chr, [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)])
)
# A line that is put between two valid records, and whether it is a bad record.
LINES: dict[str, tuple[bytes, bool]] = {
    "cut off": (LINE[:40], True),
    "nested as deeply as allowed": (nested(DEEPEST), False),
    "nested deeper": (nested(DEEPEST + 1), True),
    "nested 900": (nested(900), True),
    "nested 100,000": (nested(100_000), True),
    "a doubled key": (LINE[:-1] + b', "id": 1, "id": 2}', True),
    "a number": (answer(42), True),
    "null": (answer(None), True),
    "NUL bytes": (b"\0\0\0", True),
    "NUL in a string": (LINE.replace(b"moon", b"mo\0on"), True),
    "latin-1": (LINE.replace(b"moon", b"m\xf6on"), True),
    "a byte order mark": (b"\xef\xbb\xbf" + LINE, True),
    "a number of 5,000 digits": (b"1" * 5000, True),
    "a list": (b"[]", True),
    "not a number": (b"NaN", True),
}
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "clean": clean.main,
    "convert": convert.main,
    "split": split.main,
    "stats": stats.main,
}


def run(command: str, file: Path, model: Path, *more: str) -> dict[str, Any]:
    report, out = file.with_name("report.json"), file.with_name(f"{command}.jsonl")
    words = ["--in", str(file), "--out", str(out), "--report", str(report), "--processes", "2"]
    if command in ("split", "stats"):
        words += ["--model_name_or_path", str(model), "--template", "vicuna"]
    COMMANDS[command]([*words, *more])
    account: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    dropped = sum(n if isinstance(n, int) else len(n) for n in account["dropped"].values())
    assert account["read"] == account["kept"] + dropped
    return account


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_counts_or_names_what_is_bad(
    command: str, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join(part for line, _ in LINES.values() for part in (LINE, line)))
    more = ["--skip", "content"] if command == "clean" else []
    account = run(command, file, tiny_model, "--on_bad_record", "skip", *more)
    bad = sum(is_bad for _, is_bad in LINES.values())
    assert (account["read"], account["kept"]) == (2 * len(LINES), 2 * len(LINES) - bad)
    assert account["dropped"]["nested too deep"] in (["5", "7"], 2)
    with pytest.raises(UserError, match="record 1: line 2, column"):
        run(command, file, tiny_model)


@pytest.mark.parametrize("name", LINES)
def test_training_counts_what_is_bad_and_reads_the_rest(name: str, tmp_path: Path) -> None:
    line, is_bad = LINES[name]
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join([LINE, line, LINE]))
    dialogues, tally = dialogues_in(file, "skip")
    assert (len(dialogues), tally.dropped.total()) == (3 - is_bad, is_bad)
    file.write_bytes(b"[" + b",\n".join([LINE, line, LINE]) + b"]")
    dialogues, tally = dialogues_in(file, "skip")
    assert dialogues[0].turns[0].text == QUESTION["value"]
    assert tally.read == len(dialogues) + tally.dropped.total()
    assert (tally.dropped.total() > 0) == is_bad


def test_half_a_surrogate_pair_is_dropped_or_cleaned(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join([LINE, answer("Near \ud83d enough, I think.")]))
    for command in COMMANDS:
        account = run(command, file, tiny_model, "--on_bad_record", "skip")
        assert account["kept"] == (2 if command == "clean" else 1)
    assert dialogues_in(file, "skip")[1].dropped == {"lone surrogate": 1}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf16_is_refused_with_and_without_a_mark(
    suffix: str, encoding: str, tmp_path: Path
) -> None:
    file = tmp_path / f"data.{suffix}"
    text = "question,answer\nHi,Yo\n" if suffix == "csv" else f"{LINE.decode()}\n"
    file.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match="found UTF-16 or UTF-32; expected UTF-8"):
        [*read_records(file)]


@pytest.mark.parametrize("template", ["vicuna", "chat"])
def test_a_dialogue_of_all_private_characters_is_counted(
    template: str, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join([LINE, answer(f"{PRIVATE}<|im_end|>"), LINE]))
    flags = ("--on_bad_record", "skip", "--model_max_length", "250000", "--template", template)
    account = run("split", file, tiny_model, *flags)
    assert account["dropped"] == {"refused by the template": ["1"]}


def test_an_empty_file_and_a_folder_without_data_are_named(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    (tmp_path / "empty.jsonl").touch()
    for command in COMMANDS:
        with pytest.raises(UserError, match="a folder without data"):
            run(command, folder, tiny_model)
        with pytest.raises(UserError, match="the file is empty"):
            run(command, tmp_path / "empty.jsonl", tiny_model)


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join([LINE] * 3))
    rows = read_records(file)
    next(rows)
    with file.open("ab") as more:
        more.write(b"\n" + LINE)
    with pytest.raises(UserError, match="the file changed while it was read"):
        list(rows)


def test_a_huge_line_is_counted_in_bounded_memory(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "data.jsonl"
    with file.open("wb") as opened:
        opened.write(LINE + b"\n")
        for _ in range(4 * (LARGEST >> 20)):
            opened.write(b"x" * (1 << 20))
        opened.write(b"\n" + LINE)
    tracemalloc.start()
    found = [record for _, record in read_records(file)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [isinstance(record, BadRecord) for record in found] == [False, True, False]
    assert found[1].cause == "too large"
    assert peak < 5 * LARGEST + CHUNK_OF_A_FILE


def test_the_largest_record_is_read_within_a_gibibyte(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "data.jsonl"
    with file.open("w", encoding="utf-8") as opened:
        opened.write('{"text": "')
        for _ in range(LARGEST >> 16):
            opened.write("\U0001f600" * ((1 << 16) - 1))  # four bytes per character in memory
        opened.write('"}\n')
    tracemalloc.start()
    ((_, record),) = read_records(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(record["text"]) > 0.99 * LARGEST
    assert peak < 256 << 20


def test_tool_calls_that_cannot_be_written_as_json_stay_text() -> None:
    for levels in range(900, 1000):
        function = {"name": "f", "arguments": "[" * levels + "]" * levels}
        call = {"role": "assistant", "tool_calls": [{"function": function}]}
        made = as_sharegpt({"messages": [{"role": "user", "content": "Hi"}, call]})
        (kept,) = made["conversations"][1]["tool_calls"]
        assert kept == function


def test_a_chunk_ends_at_a_limit_of_characters_or_of_records(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    long = answer("x" * (LARGE // 4))
    file.write_bytes(b"\n".join([LINE] * (CHUNK + 1) + [long] * 9))
    made = [*chunks([file])]
    assert [len(chunk) for chunk, _ in made] == [CHUNK, 5, 4, 1]
    assert [row for chunk, _ in made for row in chunk] == [
        (record, f"{file}: record {index}") for index, record in read_records(file)
    ]
    for chunk, size in made:
        assert size == sum(characters(record) for record, _ in chunk) < LARGE * 5 / 4 + 1000


def test_the_chunks_in_flight_have_a_limit_of_characters() -> None:
    held: list[int] = []

    def given() -> Any:
        for number in range(20):
            held.append(number)
            yield [(number, "f: record 0")], IN_FLIGHT // 2

    done = 0
    for _ in in_order(len, given(), 8):
        assert len(held) - done <= 3
        done += 1
    assert done == 20


def die(chunk: Any) -> None:
    """Die like a process that the system kills because memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_one_error_message() -> None:
    given = [([(number, "f: record 0")], 1) for number in range(3)]
    with pytest.raises(RunError, match=r"was killed\. The system may have run out of memory"):
        list(in_order(die, given, 2))
