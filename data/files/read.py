"""Reads records one at a time from JSON, JSONL, CSV, Parquet and Arrow files of any size."""

import csv
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from data.errors import BadRecord, UserError
from data.files.json_stream import CHUNK, ESCAPED_BYTE, LARGEST, check_utf8, json_records

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".arrow")
# Files without records that `datasets` writes next to the Arrow files of a folder.
ARROW_METADATA = ("dataset_info.json", "state.json", "dataset_dict.json")
COMPRESSIONS = (".gz", ".zst")
ROWS_AT_ONCE = 256  # rows of a table that are converted to Python objects together


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, and the data files in folders, sorted by name; raises UserError."""
    found: list[Path] = []
    for path in paths:
        try:
            inside = [file for file in sorted(path.rglob("*")) if kind_of(file)]
            inside = [file for file in inside if not file.is_dir()]  # a broken link is an error
            if any(kind_of(file) == ".arrow" for file in inside):
                inside = [file for file in inside if file.name not in ARROW_METADATA]
            folder = path.is_dir()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
        if not folder:
            found.append(path)
            continue
        if not inside:
            raise UserError(f"{path}: a folder without data; expected files {', '.join(KINDS)}.")
        found += inside
    return found


def kind_of(path: Path) -> str | None:
    """Return the suffix of the format, such as ".json"; a suffix of compression is ignored."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (index, parsed value or BadRecord) for each record of the file.

    A JSON file that begins with [ is an array; any other has one record per line. Raises UserError
    for a file that is unreadable or empty, or that changes while it is read.
    """
    kind = kind_of(path)
    try:
        before = os.stat(path)
        if not path.is_file():
            raise UserError(f"{path}: found no regular file; expected a file or a folder of files.")
        if kind in (".parquet", ".arrow"):
            rows = _parquet(path) if kind == ".parquet" else _arrow(path)
            yield from enumerate(map(plain, rows))
        else:
            with _opened(path) as stream:
                rows = _csv(stream, path) if kind == ".csv" else json_records(stream, path)
                yield from enumerate(rows)
        after = os.stat(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read: {reason}. Give a readable data file.") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: the file changed while it was read. Run again when it is final.")


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedIOBase]:
    with open(path, "rb") as raw:
        if path.name.lower().endswith(".gz"):
            yield gzip.GzipFile(fileobj=raw)
        elif path.name.lower().endswith(".zst"):
            yield io.BufferedReader(_Decompressed(raw), CHUNK)
        else:
            yield raw


class _Decompressed(io.RawIOBase):
    """Decompresses consecutive zstd frames; raises EOFError for a damaged or truncated frame.

    The reader of zstandard 0.25 takes a truncated frame for a complete one.
    """

    def __init__(self, packed: io.BufferedReader) -> None:
        import zstandard

        self.packed, self.error = packed, zstandard.ZstdError
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame, self.raw, self.within = self.new_frame(), b"", False
        self.waiting = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes into the buffer; return their number, 0 only at the file's end."""
        while not (size := self.waiting.readinto(buffer)):
            # Only few bytes are read, because 4 bytes may decompress to 128 KiB.
            self.raw = self.raw or self.packed.read(256)
            if not self.raw:
                if self.within:
                    raise EOFError("its last frame is truncated")
                return 0
            try:
                self.waiting, self.within = io.BytesIO(self.frame.decompress(self.raw)), True
            except self.error as error:
                raise EOFError(str(error)) from None
            self.raw = b""
            if self.frame.eof:
                self.raw, self.within = self.frame.unused_data, False
                self.frame = self.new_frame()
        return size


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as opened:
            for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE):
                yield from map(_as_written, batch.to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a complete Parquet file: {error}.") from None


def _arrow(path: Path) -> Iterator[Any]:
    """Yield the rows of an Arrow file or an Arrow stream; `datasets` writes both."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as mapped:
            try:
                opened = pa.ipc.open_file(mapped)
                batches = map(opened.get_batch, range(opened.num_record_batches))
            except pa.ArrowInvalid:
                mapped.seek(0)
                batches = pa.ipc.open_stream(mapped)
            for batch in batches:
                for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                    rows = batch.slice(start, ROWS_AT_ONCE).to_pylist()
                    yield from map(_as_written, rows)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(
            error, "errno", None
        ):  # an I/O error; the error for a truncated file has no errno
            raise
        raise UserError(f"{path}: not a complete Arrow file: {error}.") from None


def _as_written(row: dict[str, Any]) -> dict[str, Any]:
    """Return a table's row without the keys that Arrow has added to its structs.

    All structs of a column have the same keys: a key that one lacks becomes null.
    """
    return {name: _without_nulls(value) for name, value in row.items()}


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


def _csv(stream: io.BufferedIOBase, path: Path) -> Iterator[Any]:
    csv.field_size_limit(LARGEST)
    stream = io.BufferedReader(cast(Any, stream))
    check_utf8(stream.peek(4)[:4], path)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        for row in csv.DictReader(text, strict=True):
            if None in row or None in row.values():
                yield BadRecord("not valid CSV", "the row has more or fewer fields than the header")
            elif any(ESCAPED_BYTE.search(value) for value in row.values()):
                yield BadRecord("not UTF-8", "found an invalid byte; save the file as UTF-8")
            else:
                yield row
    except (csv.Error, EOFError, zlib.error) as error:
        yield BadRecord("not valid CSV", f"the file breaks off: {error}")
