"""Reads records one at a time from the files that people keep dialogues in, whatever their size."""

import csv
import gzip
import io
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.errors import BadRecord, UserError
from data.json_stream import CHUNK, LARGEST, json_records

KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
PACKED = (".gz", ".zst")


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files, those of a folder in the order of their names; raises UserError."""
    found: list[Path] = []
    for path in paths:
        try:
            inside = [file for file in sorted(path.rglob("*")) if kind_of(file)]
            inside = [file for file in inside if not file.is_dir()]  # a broken link is an error
            folder = path.is_dir()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
        if not folder:
            found.append(path)
            continue
        if not inside:
            raise UserError(f"{path}: a folder without data; expected {', '.join(KINDS)} files.")
        found += inside
    return found


def kind_of(path: Path) -> str | None:
    """Return the suffix that says how records are kept, without that of a compression."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (index, parsed value or BadRecord) for each record of the file.

    A text file that begins with [ is an array, any other one record a line. Raises UserError for a
    file that cannot be read, is empty, or changes meanwhile.
    """
    kind = kind_of(path)
    try:
        before = os.stat(path)
        if not path.is_file():
            raise UserError(f"{path}: found no regular file; expected one, or a folder of them.")
        if kind == ".parquet":
            yield from enumerate(_parquet(path))
        else:
            with _opened(path) as stream:
                yield from enumerate(_csv(stream) if kind == ".csv" else json_records(stream, path))
        after = os.stat(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{path}: cannot be read: {reason}. Give a JSON or JSONL file.") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise UserError(f"{path}: it changed while it was read. Run again when it is complete.")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as raw:
        if path.name.lower().endswith(".gz"):
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw))
        elif path.name.lower().endswith(".zst"):
            import zstandard

            unpacked = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            yield cast(BinaryIO, io.BufferedReader(cast(Any, unpacked), CHUNK))
        else:
            yield raw


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as opened:
            for batch in opened.iter_batches(batch_size=256):
                yield from (_plain(row) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a whole Parquet file: {error}.") from None


def _plain(value: Any) -> Any:
    """Return a value of Parquet as JSON has it; dates and such as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _csv(stream: BinaryIO) -> Iterator[Any]:
    csv.field_size_limit(LARGEST)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        for row in csv.DictReader(text, strict=True):
            if None in row or None in row.values():
                yield BadRecord("not valid CSV", "its row has more or fewer fields than the header")
            else:
                yield row
    except (csv.Error, EOFError, zlib.error) as error:
        yield BadRecord("not valid CSV", f"breaks off: {error}")
