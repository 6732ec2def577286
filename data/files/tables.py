"""Reads the rows of Parquet, Arrow and CSV files one at a time."""

import csv
import io
import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any, cast

from data.errors import BadRecord, UserError
from data.files.json_loose import LARGEST
from data.files.json_stream import ESCAPED_BYTE, check_utf8, not_utf8

ROWS_AT_ONCE = 256  # rows of a table that are converted to Python objects together
BATCH_BYTES = 32 << 20  # of these rows, before compression
SAMPLE = 64 << 10  # characters from which the delimiter is decided
SAMPLE_ROWS = 20
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def parquet_rows(opened: Any, name: str) -> Iterator[Any]:
    """Yield the rows of an open Parquet file; large rows are converted fewer at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(opened) as file:
            groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
            row = max((g.total_byte_size / max(1, g.num_rows) for g in groups), default=1) or 1
            size = max(1, min(ROWS_AT_ONCE, int(BATCH_BYTES / row)))
            for batch in file.iter_batches(batch_size=size):
                yield from map(_as_written, batch.to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not a complete Parquet file: {error}.") from None


def arrow_rows(opened: Any, name: str) -> Iterator[Any]:
    """Yield the rows of an Arrow file or an Arrow stream; `datasets` writes both.

    opened: a memory map, or an open binary file.
    """
    import pyarrow as pa

    try:
        try:
            file = pa.ipc.open_file(opened)
            batches = map(file.get_batch, range(file.num_record_batches))
        except pa.ArrowInvalid:
            opened.seek(0)
            batches = pa.ipc.open_stream(opened)
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                rows = batch.slice(start, ROWS_AT_ONCE).to_pylist()
                yield from map(_as_written, rows)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None):  # the error for a truncated file has no errno
            raise
        raise UserError(f"{name}: not a complete Arrow file: {error}.") from None


def _as_written(row: dict[str, Any]) -> Any:
    """Return a table's row without the keys that Arrow has added to its structs.

    All structs of a column have the same keys: a key that one lacks becomes null.
    """
    return plain({name: _without_nulls(value) for name, value in row.items()})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Return a value as valid JSON: NaN and infinities as null, dates and other types as text."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def csv_rows(stream: IO[bytes], name: str, notes: Counter[str]) -> Iterator[Any]:
    """Yield the rows of a CSV stream as objects; its first rows decide the delimiter."""
    csv.field_size_limit(LARGEST)
    buffered = io.BufferedReader(cast(Any, stream), SAMPLE)
    try:
        check_utf8(buffered.peek(4)[:4], name)
        sample = buffered.peek(SAMPLE).decode("utf-8-sig", "replace")
        delimiter, skipped = _delimiter(sample, name)
        if delimiter != ",":
            notes[f"files with {DELIMITERS.get(delimiter, repr(delimiter))} between fields"] += 1
        text = io.TextIOWrapper(buffered, "utf-8-sig", errors="surrogateescape", newline="")
        if skipped:
            text.readline()
        reader = csv.DictReader(text, delimiter=delimiter, strict=True)
        _check_header([*(reader.fieldnames or ())], name)
        for row in reader:
            if None in row or None in row.values():
                yield BadRecord("not valid CSV", _unequal(row, reader))
            elif any(ESCAPED_BYTE.search(value) for value in row.values()):
                whole = delimiter.join(row.values())
                found = not_utf8(whole)
                yield BadRecord("not UTF-8", f"line {reader.line_num}: {found}")
            else:
                yield row
    except (csv.Error, EOFError, zlib.error, zipfile.BadZipFile) as error:
        yield BadRecord("not valid CSV", f"the file breaks off: {error}")


def _unequal(row: dict[Any, Any], reader: "csv.DictReader[str]") -> str:
    names = reader.fieldnames or ()
    found = len(names) + len(row.get(None) or ()) - sum(one is None for one in row.values())
    return (
        f"line {reader.line_num}: the row has more or fewer fields than the header: found {found}; "
        f"expected {len(names)} ({', '.join(names)[:80]}), with text that holds "
        f'{reader.reader.dialect.delimiter!r} or a line break in "double quotes"'
    )


def _check_header(names: list[str], name: str) -> None:
    if not any(field.strip() for field in names):
        raise UserError(f"{name}: the file is empty; expected a CSV header and rows.")
    twice = [field for field, count in Counter(names).items() if count > 1 and field.strip()]
    if twice:
        raise UserError(
            f'{name}: found two columns "{twice[0]}"; expected a name for each column. Rename one '
            "of them in the first line."
        )


def _delimiter(sample: str, name: str) -> tuple[str, bool]:
    """Return the delimiter, and whether the first line only declares it, as Excel's sep=; does."""
    first, _, _ = sample.partition("\n")
    declared = first.strip().lower()
    if declared.startswith("sep=") and len(declared) == 5:
        return declared[-1], True
    if first.rstrip("\r").strip() == "":
        return ",", False
    default = "\t" if ".tsv" in name.lower() or ".tab" in name.lower() else ","
    widths = {mark: _width(sample, mark) for mark in DELIMITERS}
    best = max(widths.values())
    if best < 2 or widths[default] == best:
        return default, False
    return max(widths, key=lambda mark: widths[mark]), False


def _width(sample: str, delimiter: str) -> int:
    """Return the number of fields of the header if all sampled rows have as many; else 1."""
    rows: list[list[str]] = []
    try:
        for row in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True):
            rows += [row] if row else []
            if len(rows) > SAMPLE_ROWS:
                break
    except csv.Error:
        rows = rows[: SAMPLE_ROWS + 1]
    if len(sample) >= SAMPLE - 4 and len(rows) > 1:
        rows.pop()  # it may be cut
    return len(rows[0]) if rows and len({len(row) for row in rows}) == 1 else 1


def field_names(sample: str, name: str) -> list[str]:
    """Return the column names of a text that begins like a CSV file; none of another text."""
    delimiter, _ = _delimiter(sample, name)
    lines = sample.splitlines()
    if len(lines) < 2 or _width(sample.rpartition("\n")[0], delimiter) < 2:
        return []
    return next(csv.reader([lines[0]], delimiter=delimiter))
