"""Containers: the bytes of a file decide how it is read; what holds no records is named."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import shlex
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from data.errors import BadRecord, UserError
from data.files.read import find_files, placed_records, read_records
from data.preparation import convert


def dialogue(number: int) -> dict[str, Any]:
    # Brackets, comment marks and quotes in a text must not be taken for JSON.
    question = {"role": "user", "content": f'Q{number} {{["// \\" # /* ,}}'}
    return {"messages": [question, {"role": "assistant", "content": f"A{number}, é"}]}


RECORDS = [dialogue(number) for number in range(3)]
LINES = [json.dumps(record) for record in RECORDS]
PRETTY = [json.dumps(record, indent=2) for record in RECORDS]
JSONL = "\n".join(LINES).encode()


def zipped(files: Mapping[str, bytes | str]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def table(stream: bool = False) -> bytes:
    made, rows = io.BytesIO(), pa.Table.from_pylist(RECORDS)
    if stream:
        with pa.ipc.new_stream(made, rows.schema) as writer:
            writer.write_table(rows)
    else:
        parquet.write_table(rows, made)
    return made.getvalue()


def read(file: Path, content: bytes | str) -> tuple[list[Any], Counter[str]]:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    notes = Counter[str]()
    return [record for _, record in read_records(file, notes)], notes


NESTED = '{"of": 1, "data": %s}'
TEXTS = {
    "one object a line": "\n".join(LINES),
    "CR alone": "\r".join(LINES),
    "CR and LF": "\r\n".join(LINES),
    "indented": "\n".join(PRETTY),
    "glued": "".join(LINES),
    "glued and indented": "".join(PRETTY),
    "an array": json.dumps(RECORDS, indent=1),
    "arrays": json.dumps(RECORDS[:1]) + "\n" + json.dumps(RECORDS[1:]),
    "an array, then lines": json.dumps(RECORDS[:1]) + "\n" + "\n".join(LINES[1:]),
    "commas after lines": ",\n".join(LINES) + ",\n",
    "a comma after the last": "[" + ",".join(LINES) + ",]",
    "commas in records": "\n".join(f"{line[:-1]},}}" for line in LINES),
    "comments between": "// don't [\n" + "\n# it's {\n".join(LINES) + "\n/* end { */",
    "comments in records": json.dumps(RECORDS, indent=1).replace("\n }", "\n /* {it's */ // [\n }"),
    "under data": NESTED % json.dumps(RECORDS),
    "under data, indented": json.dumps({"data": RECORDS, "license": "x"}, indent=1),
    "under another key": json.dumps({"everything": RECORDS}),
    "rows of the hub's viewer": json.dumps(
        {"features": [{"name": "messages"}], "rows": [{"row_idx": 0, "row": r} for r in RECORDS]}
    ),
    "pandas' orient split": json.dumps(
        {"columns": ["messages"], "index": [0, 1, 2], "data": [[r["messages"]] for r in RECORDS]}
    ),
}


@pytest.mark.parametrize("form", TEXTS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_records_are_read_however_the_text_separates_them(
    form: str, mark: str, tmp_path: Path
) -> None:
    assert read(tmp_path / "a.json", mark + TEXTS[form])[0] == RECORDS
    assert read(tmp_path / "a.jsonl.gz", gzip.compress((mark + TEXTS[form]).encode()))[0] == RECORDS


@pytest.mark.parametrize("form", TEXTS)
def test_records_are_read_across_the_pieces_in_which_a_file_is_read(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (5, 16, 61):
        monkeypatch.setattr("data.files.json_stream.CHUNK", size)
        assert read(tmp_path / "a.json", TEXTS[form])[0] == RECORDS


def test_what_is_accepted_beside_plain_json_is_counted(tmp_path: Path) -> None:
    noted = {form: read(tmp_path / "a.json", text)[1] for form, text in TEXTS.items()}
    assert not noted["indented"] | noted["glued"] | noted["an array"] | noted["one object a line"]
    assert noted["commas in records"] == {"records with comments or trailing commas": 3}
    assert noted["comments between"] == {"comments between records": 4}
    assert noted["under data"] == {
        'files with records under "data"': 1,
        "files with keys beside the records, not read (of)": 1,
    }


def test_a_list_of_messages_is_one_record(tmp_path: Path) -> None:
    turns = [record["messages"] for record in RECORDS]
    assert read(tmp_path / "a.json", json.dumps(turns[0], indent=1))[0] == turns[:1]
    assert read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, turns)))[0] == turns
    assert read(tmp_path / "b.json", json.dumps(turns))[0] == turns


@pytest.mark.parametrize(
    "record",
    [
        {"id": 1, "data": ["Hi", "Yes."]},
        {"id": 1, "items": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]},
        {"instruction": "Hi", "examples": [{"input": "a"}], "output": "Yes."},
        {"channel": {}, "messages": [{"content": "Hi", "author": {}}]},
    ],
)
def test_a_record_that_holds_lists_is_no_container(record: Any, tmp_path: Path) -> None:
    for text in (json.dumps(record), json.dumps(record, indent=1), json.dumps([record])):
        assert read(tmp_path / "a.json", text)[0] == [record]
    lines = "\n".join([json.dumps({"data": [{"a": 1}]})] * 2)
    assert read(tmp_path / "a.json", lines)[0] == [{"data": [{"a": 1}]}] * 2


def test_a_table_by_column_is_read_by_row(tmp_path: Path) -> None:
    by_index = {"instruction": {"0": "a", "1": "b"}, "output": {"0": "c", "1": "d"}}
    by_list = {"instruction": ["a", "b"], "output": ["c", "d"]}
    rows = [{"instruction": "a", "output": "c"}, {"instruction": "b", "output": "d"}]
    for given in (by_index, by_list):
        found, notes = read(tmp_path / "a.json", json.dumps(given, indent=1))
        assert (found, notes) == (rows, {"files that hold their table by column": 1})


def test_a_cut_record_spoils_no_other_record(tmp_path: Path) -> None:
    for lines in (LINES, PRETTY):
        for cut in range(2, len(lines[1]) - 1, 7):
            text = "\n".join([lines[0], lines[1][:cut], lines[2]])
            found, _ = read(tmp_path / "a.json", text)
            assert (found[0], found[-1]) == (RECORDS[0], RECORDS[2])
            assert found[1:-1]
            assert all(isinstance(record, BadRecord) for record in found[1:-1])


PACKED = {
    "gzip": gzip.compress(JSONL),
    "zstd": zstandard.compress(JSONL),
    "xz": lzma.compress(JSONL),
    "bzip2": bz2.compress(JSONL),
    "zip": zipped({"data.jsonl": JSONL}),
    "zip in a zip": zipped({"in.zip": zipped({"data.jsonl": JSONL})}),
    "Parquet": table(),
    "Parquet in gzip": gzip.compress(table()),
    "Parquet in a zip": zipped({"a.parquet": table()}),
    "Arrow": table(stream=True),
    "streams of xz": lzma.compress(JSONL[:100]) + lzma.compress(JSONL[100:]),
    "streams of bzip2": bz2.compress(JSONL[:100]) + bz2.compress(JSONL[100:]),
}


@pytest.mark.parametrize("kind", PACKED)
def test_the_bytes_decide_whatever_the_name(kind: str, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "a", "a.csv", "a.parquet"):
        assert read(tmp_path / name, PACKED[kind])[0] == RECORDS
    notes = read(tmp_path / "a.jsonl", PACKED[kind])[1]
    if kind in ("gzip", "xz", "Parquet", "Arrow"):
        assert notes == {f"files read as {kind}, by their bytes": 1}


def test_json_named_as_a_table_is_read_as_json(tmp_path: Path) -> None:
    for name in ("a.csv", "a.tsv", "a.parquet", "a.arrow"):
        found, notes = read(tmp_path / name, JSONL)
        assert (found, notes) == (RECORDS, {"files read as JSON, by their bytes": 1})


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("a.csv", "instruction,output\na;b,c\n", ""),
        ("a.tsv", "instruction\toutput\na;b\tc\n", "tabs"),
        ("a.csv", "instruction\toutput\na;b\tc\n", "tabs"),
        ("a.csv", 'instruction;output\n"a;b";c\n', "semicolons"),
        ("a.csv", 'sep=;\ninstruction;output\n"a;b";c\n', "semicolons"),
        ("a.csv", "instruction|output\na;b|c\n", "vertical bars"),
        ("a.csv", "\ufeffinstruction,output\r\na;b,c\r\n", ""),
        ("a.csv", "instruction,output\ra;b,c\r", ""),
    ],
)
def test_the_rows_of_a_table_decide_its_delimiter(
    name: str, text: str, note: str, tmp_path: Path
) -> None:
    found, notes = read(tmp_path / name, text)
    assert found == [{"instruction": "a;b", "output": "c"}]
    assert [*notes] == ([f"files with {note} between fields"] if note else [])


def test_a_table_with_one_column_is_not_divided(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "text\nhello; you\n")[0] == [{"text": "hello; you"}]
    (bad, good), _ = read(tmp_path / "a.csv", "a,b\n1,2,3\n4,5\n")
    assert "line 2: the row has more or fewer fields than the header: found 3; expected 2" in str(
        bad
    )
    assert good == {"a": "4", "b": "5"}


def test_each_file_of_an_archive_is_read_and_named(tmp_path: Path) -> None:
    file = tmp_path / "a.zip"
    files = {"a.jsonl": LINES[0], "b/c.json": json.dumps(RECORDS[1:]), "b/.x.json": "x"}
    file.write_bytes(zipped({**files, "__MACOSX/a.jsonl": "x", "README.md": "x"}))
    places = [f"{file}/a.jsonl: record 0", *(f"{file}/b/c.json: record {n}" for n in (0, 1))]
    notes = Counter[str]()
    assert [*placed_records(file, notes)] == [*zip(RECORDS, places, strict=True)]
    assert notes == {"files of a.zip (a.jsonl, b/c.json)": 1}


def test_a_highly_compressed_file_is_read_in_little_memory(tmp_path: Path) -> None:
    space = b"\n" * (256 << 20) + LINES[0].encode()
    for content in (lzma.compress(space, preset=0), zipped({"a.jsonl": space})):
        file = tmp_path / "a.jsonl"
        file.write_bytes(content)
        tracemalloc.start()
        assert [record for _, record in read_records(file)] == RECORDS[:1]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 64 << 20


def test_archives_within_archives_end(tmp_path: Path) -> None:
    content = JSONL
    for _ in range(5):
        content = zipped({"a.zip": content})
    with pytest.raises(UserError, match="more than 3 archives within each other"):
        read(tmp_path / "a.zip", content)
    bomb = gzip.compress(b"PAR1" + bytes(64 << 20))
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        read(tmp_path / "a.parquet.gz", bomb)


REFUSED = {
    "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 1\n": "a Git LFS pointer",
    "\n<!-- x --><!DOCTYPE html><html>": "found an HTML page in place of the data",
    "<?xml version='1.0'?><Error>": "found XML in place of the data",
    "404: Not Found": "of a failed download",
    "\x93NUMPY": "found a NumPy array",
    "hello, you\nthere": "found a table with the columns hello,  you",
    "Hello there.": "found text that begins with 'Hello there.'",
    "\0\0\0\0\0\0\0": "found binary data",
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("text", REFUSED)
def test_a_file_without_records_is_named_for_what_it_is(
    text: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"{name}: found .*") as raised:
        read(tmp_path / name, text.encode("latin-1"))
    assert REFUSED[text] in str(raised.value)
    with pytest.raises(UserError, match=rf"a\.zip/{name}: found"):
        read(tmp_path / "a.zip", zipped({name: text.encode("latin-1")}))


def test_the_command_for_a_pointer_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "of mine" / "a.parquet"
    file.parent.mkdir()
    with pytest.raises(UserError) as raised:
        read(file, "version https://git-lfs.github.com/spec/v1\n")
    words = shlex.split(str(raised.value).partition("Fetch it: ")[2])
    assert words == ["git", "-C", str(file.parent), "lfs", "pull", "--include", "a.parquet"]


def run_remedy(file: Path, content: bytes, before: str) -> Path:
    """Return the file that the command in the message of the refusal writes."""
    with pytest.raises(UserError) as raised:
        read(file, content)
    remedy = str(raised.value).partition(before)[2].rstrip(".")
    remedy = remedy.replace("python -c", f"{shlex.quote(sys.executable)} -c")
    done = subprocess.run(remedy, shell=True, cwd=file.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = {*file.parent.iterdir()} - {file}
    return made


@pytest.mark.parametrize(
    ("content", "before"),
    [
        (pickle.dumps(RECORDS), "as JSONL: "),
        (str(RECORDS[0]).encode(), "as JSONL: "),
        (b"instruction,output\na,b\n", "suffix .csv: "),
    ],
)
def test_the_command_of_a_refusal_writes_a_file_that_is_read(
    content: bytes, before: str, tmp_path: Path
) -> None:
    # pandas reads a pickled table, not a list.
    if content[:1] == b"\x80":
        pandas = pytest.importorskip("pandas")
        content = pickle.dumps(pandas.DataFrame(RECORDS))
    made = run_remedy(tmp_path / "a b.json", content, before)
    out = tmp_path / "out.jsonl"
    convert.main(["--in", str(made), "--out", str(out), "--processes", "1"])
    assert json.loads(out.read_text().partition("\n")[0])["conversations"]


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "cp1251", "shift_jis"])
def test_the_encoding_that_the_message_names_reads_the_file(encoding: str, tmp_path: Path) -> None:
    text = {
        "cp1251": "Какой спутник самый большой? Это Ганимед, спутник планеты Юпитер.",
        "shift_jis": "いちばん大きい衛星は何ですか。それは木星の衛星のガニメデです。",
    }.get(encoding, "Où est la forêt? Elle est près d'ici, à côté.")
    record = {"instruction": text, "output": text}
    for name, content in {
        "a.jsonl": json.dumps(record, ensure_ascii=False) + "\n",
        "a.csv": f'instruction,output\n"{text}","{text}"\n',
    }.items():
        file, out = tmp_path / name, tmp_path / "out.jsonl"
        file.write_bytes(content.encode(encoding))
        words = ["--in", str(file), "--out", str(out), "--processes", "1"]
        with pytest.raises(UserError, match="--encoding ") as raised:
            convert.main(words)
        flag, named = shlex.split(str(raised.value).partition("give ")[2] or str(
            raised.value).partition("Give ")[2])[:2]  # fmt: skip
        convert.main([*words, flag, named.rstrip(",")])
        turns = json.loads(out.read_text("utf-8"))["conversations"]
        assert {turn["value"] for turn in turns} == {text}


def test_a_wrong_encoding_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(JSONL + '{"text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"--encoding utf-99: unknown"):
        find_files([file], "utf-99")
    for encoding in ("ascii", "utf-8"):
        (found,) = find_files([file], encoding)
        with pytest.raises(UserError, match=rf"is not {encoding}; give another --encoding"):
            [*read_records(found)]


@pytest.mark.parametrize("line", ['{"a": [1,]', '{"messages": [{"role": ', '{"a": [[[[[[[['])
def test_many_cut_lines_are_read_in_linear_time(line: str, tmp_path: Path) -> None:
    began = time.process_time()
    found, _ = read(tmp_path / "a.jsonl", "\n".join([line] * 20_000))
    assert len(found) == 20_000
    assert all(isinstance(record, BadRecord) for record in found)
    assert time.process_time() - began < 30


def test_an_encrypted_archive_is_refused_with_the_command_that_unpacks_it(tmp_path: Path) -> None:
    content = bytearray(zipped({"a.jsonl": JSONL}))
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the archive's directory
    file = tmp_path / "of mine.zip"
    with pytest.raises(
        UserError, match=r"of mine\.zip/a\.jsonl: the archive is encrypted"
    ) as raised:
        read(file, bytes(content))
    assert f"unzip {shlex.quote(str(file))} -d data" in str(raised.value)
