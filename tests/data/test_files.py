"""Truncated and corrupt compressed files are read as far as possible; invalid tables are named."""

import gzip
import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from data.errors import BadRecord, UserError
from data.files.read import read_records

TEXTS = random.Random(0)
RECORDS = [{"n": n, "text": f"{TEXTS.random()}"} for n in range(20_000)]
LINES = "\n".join(map(json.dumps, RECORDS)).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstandard.compress}


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_all_complete_records_of_a_truncated_file_are_read_and_the_damage_is_named(
    kind: str, tmp_path: Path
) -> None:
    packed = PACK[kind](LINES)
    file = tmp_path / f"a.jsonl.{kind}"
    file.write_bytes(packed[: len(packed) * 9 // 10])
    found = [record for _, record in read_records(file)]
    good = [record for record in found if not isinstance(record, BadRecord)]
    assert good == RECORDS[: len(good)]
    # zstd is decompressed up to the last complete block of 128 KiB, gzip up to the last byte.
    assert len(good) > len(RECORDS) * (0.89 if kind == "gz" else 0.7)
    errors = [str(record) for record in found if isinstance(record, BadRecord)]
    assert "its compression is damaged" in errors[-1]


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_damage_in_the_middle_of_a_file_is_named(suffix: str, kind: str, tmp_path: Path) -> None:
    rows = "n,text\n" + "\n".join(f"{one['n']},{one['text']}" for one in RECORDS)
    raw = bytearray(PACK[kind](LINES if suffix == "jsonl" else rows.encode()))
    raw[len(raw) // 2 : len(raw) // 2 + 64] = b"\xff" * 64
    file = tmp_path / f"a.{suffix}.{kind}"
    file.write_bytes(raw)
    # For some kinds of damage, gzip raises OSError.
    with suppress(UserError):
        found = [record for _, record in read_records(file)]
        assert isinstance(found[-1], BadRecord)


def test_consecutive_frames_are_one_file(tmp_path: Path) -> None:
    parts = [json.dumps(record).encode() + b"\n" for record in RECORDS[:300]]
    for kind, pack in PACK.items():
        file = tmp_path / f"a.jsonl.{kind}"
        file.write_bytes(b"".join(map(pack, parts)))
        assert [record for _, record in read_records(file)] == RECORDS[:300]


def test_a_highly_compressed_file_is_read_in_pieces(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(b"\n" * (256 << 20) + b'{"a": 1}'))
    assert file.stat().st_size < 64 << 10
    tracemalloc.start()
    assert [record for _, record in read_records(file)] == [{"a": 1}]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 192 << 20


def test_invalid_tables_are_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / "a.csv"
    file.write_bytes("a,b\n1,2\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.csv: found UTF-16 or UTF-32; expected UTF-8"):
        [*read_records(file)]
    file.write_bytes("a,b\ncaf\xe9,2\n3,4\n".encode("latin-1"))
    bad, good = (record for _, record in read_records(file))
    assert isinstance(bad, BadRecord)
    assert (bad.cause, good) == ("not UTF-8", {"a": "3", "b": "4"})
    latin = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": latin}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a complete Parquet file"):
        [*read_records(tmp_path / "a.parquet")]
