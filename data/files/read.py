"""Reads records one at a time from files of any format and size; the bytes decide the format."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data.errors import UserError
from data.files.containers import (
    ARROW,
    ARROW_STREAM,
    PARQUET,
    check_encoding,
    on_disk,
    recoded,
    unpacked,
)
from data.files.json_file import json_records
from data.files.json_stream import check_utf8
from data.files.names import KINDS, kind_of, without_metadata
from data.files.splits import DataFile, listed, select_split, without_split
from data.files.tables import arrow_rows, csv_rows, field_names, parquet_rows, plain

__all__ = ["find_files", "kind_of", "placed_records", "plain", "read_records"]

JSON_HEAD = re.compile(rb"\s*(\{\s*[\"}]|\[\s*[\[{\"\]])")
PYTHON_HEAD = re.compile(rb"\s*(\[\s*)?\{\s*'")
NO_JSON = re.compile(r"\s*[^\W\d_]")
BRACKET_LINE = re.compile(rb"(\A|[\r\n])[ \t]*[\[{]")


def find_files(paths: Sequence[Path], encoding: str | None = None) -> list[Path]:
    """Return the files, and the data files in folders, sorted by name; raises UserError.

    Of a folder with parts for training and others, those for training are returned; `folder@test`
    selects another.
    """
    check_encoding(encoding)
    found: list[Path] = []
    for given in paths:
        path, part = without_split(given)
        of_file = encoding or getattr(given, "encoding", None)
        try:
            inside = sorted(path.rglob("*"))
            names = [str(file.relative_to(path)) for file in inside]
            folder = path.is_dir()
            names = [name for name in names if not (path / name).is_dir()]  # a broken link stays
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
        if not folder:
            found.append(DataFile.of(path, part, of_file))
            continue
        data = without_metadata(names)
        if not data:
            has = f" (found {listed(names)})" if names else ""
            expected = f"expected files {', '.join(KINDS)}. Give such a file, or its folder."
            raise UserError(f"{path}: a folder without data{has}; {expected}")
        chosen, note = select_split(data, part, str(path))
        found += [DataFile.of(path / name, None, of_file, note) for name in chosen]
    return found


def read_records(path: Path, notes: Counter[str] | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (index, parsed value or BadRecord) for each record of the file.

    The members of an archive are read one after another, and each counts from 0. A JSON file is an
    array, one value per line, or an object with records under a key. notes: what the account says
    of the file. Raises UserError for a file that is unreadable or empty, or that changes while it
    is read.
    """
    return ((index, record) for index, record, _ in _records(path, notes))


def placed_records(path: Path, notes: Counter[str] | None = None) -> Iterator[tuple[Any, str]]:
    """Yield each record, as `read_records`, with its place: "file/member: record 7"."""
    return ((record, f"{name}: record {n}") for n, record, name in _records(path, notes))


def _records(path: Path, notes: Counter[str] | None) -> Iterator[tuple[int, Any, str]]:
    notes = Counter() if notes is None else notes
    if note := getattr(path, "note", ""):
        notes[note] += 1
    try:
        before = os.stat(path)
        if not path.is_file():
            raise UserError(f"{path}: found no regular file; expected a file or a folder of files.")
        with open(path, "rb") as opened:
            for name, stream, head in unpacked(opened, path, notes):
                rows = _rows(stream, head, path, name, notes)
                for index, row in enumerate(rows):
                    yield index, row, name
        after = os.stat(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read: {reason}. Give a readable data file.") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: the file changed while it was read. Run again when it is final.")


def _rows(
    stream: IO[bytes], head: bytes, path: Path, name: str, notes: Counter[str]
) -> Iterator[Any]:
    """Return the records of a stream whose compression is removed."""
    kind = kind_of(Path(name))
    # The split of an archive has been selected by the names of its members.
    part = getattr(path, "part", None) if name == str(path) else None
    if part and not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        raise UserError(f"{name}@{part}: the file has no splits. Give {name}.")
    by_bytes = {PARQUET: ".parquet", ARROW: ".arrow", ARROW_STREAM: ".arrow"}
    found = next((kind for start, kind in by_bytes.items() if head.startswith(start)), None)
    if found and kind != found and (kind, found) != (".feather", ".arrow"):
        notes[f"files read as {'Parquet' if found == '.parquet' else 'Arrow'}, by their bytes"] += 1
    is_json = JSON_HEAD.match(head)
    by_name = kind if not is_json else None
    if (found or by_name) == ".parquet":
        return parquet_rows(on_disk(stream, path, name), name)
    if (found or by_name) in (".arrow", ".feather"):
        return arrow_rows(on_disk(stream, path, name), name)
    encoding = getattr(path, "encoding", None)
    if encoding:
        stream = recoded(stream, encoding, name)
        notes[f"files read with --encoding {encoding}"] += 1
    elif kind not in (".csv", ".tsv"):
        _check_json(head, name, path)
    if kind in (".csv", ".tsv") and not is_json:
        return csv_rows(stream, name, notes)
    if kind in (".csv", ".tsv", ".parquet", ".arrow", ".feather"):
        notes["files read as JSON, by their bytes"] += 1
    return json_records(stream, name, notes, part)


def _check_json(head: bytes, name: str, path: Path) -> None:
    """Raise UserError for a text without JSON whose form is known."""
    file = shlex.quote(str(path))
    check_utf8(head[:4], name)
    if PYTHON_HEAD.match(head):
        raise UserError(
            f"{name}: found Python literals, with 'single quotes'; expected JSON. Write them as "
            'JSONL: python -c "import ast, json, sys; [print(json.dumps(ast.literal_eval(line))) '
            f'for line in sys.stdin if line.strip()]" < {file} > data.jsonl'
        )
    text = head.decode("utf-8-sig", "replace")
    if BRACKET_LINE.search(head.removeprefix(b"\xef\xbb\xbf")) or not text.strip():
        return
    expected = "expected JSON, JSONL, CSV, Parquet or Arrow"
    if "\0" in text:
        raise UserError(f"{name}: found binary data; {expected}. Give the file with the records.")
    names = field_names(text, name)
    if len(names) > 1:
        copy = shlex.quote(f"{path}.csv")
        raise UserError(
            f"{name}: found a table with the columns {listed(names)[:80]}; expected JSON. Give it "
            f"the suffix .csv: cp {file} {copy}"
        )
    if NO_JSON.match(text):
        begin = " ".join(text[:40].split())
        raise UserError(
            f"{name}: found text that begins with {begin!r}; {expected}. Write each dialogue on a "
            'line of its own: {"messages": [{"role": "user", "content": "…"}, {"role": '
            '"assistant", "content": "…"}]}'
        )
