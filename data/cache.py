"""Keeps encoded examples in Arrow's columns: in memory, or in a file for as long as it fits."""

import fcntl
import json
import os
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

import pyarrow as pa

from data.encode import Example
from data.errors import UserError
from data.sharegpt import Tally

FORMAT = "lora-loop encoded data 2"  # to be raised when the same key would give other ids
OURS = FORMAT[:22].encode()
BATCH = 1024  # examples that are held while a file is written
COLUMNS = {
    "id": pa.string(),
    "input_ids": pa.list_(pa.int32()),
    "labels": pa.list_(pa.int32()),
    "supervised_tokens": pa.int32(),
    "record": pa.int64(),
    "is_pair": pa.bool_(),
}
CHECKSUM = 4  # bytes at a file's end


class Examples(Sequence[Example]):
    """Examples in Arrow's record batches, read where they lie; `tally` is the account of all."""

    def __init__(self, source: Any) -> None:
        reader = pa.ipc.open_file(source)
        found = [reader.get_batch_with_custom_metadata(n) for n in range(reader.num_record_batches)]
        self.batches = [batch for batch, _ in found]
        self.ends, end = [], 0
        for batch in self.batches:
            end += batch.num_rows
            self.ends.append(end)
        read, kept, dropped, noted, named, answers, ended = json.loads(found[-1][1][b"tally"])
        self.tally = Tally(read, kept, Counter(dropped), Counter(noted), named, answers, ended)
        self.key = json.loads(reader.schema.metadata[b"key"])
        self.format = reader.schema.metadata[b"format"].decode()

    def __len__(self) -> int:
        return int(self.ends[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return an example, its ids as lists."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number = bisect_right(self.ends, place)
        row = place - (self.ends[number - 1] if number else 0)
        values = [column[row] for column in self.batches[number].columns]
        ids, labels = (value.values.to_numpy().tolist() for value in values[1:3])
        name, supervised, record, is_pair = (values[n].as_py() for n in (0, 3, 4, 5))
        return Example(name, ids, labels, supervised, record, is_pair)


def in_memory(examples: Iterable[Example], tally: Tally) -> Examples:
    """Return the examples in memory, in a tenth of what lists of Python's numbers take."""
    sink = BytesIO()
    _write(sink, {}, examples, tally)
    return Examples(pa.py_buffer(sink.getvalue()))


def read_cache(path: str, key: dict[str, Any], silent: bool = False) -> Examples | None:
    """Return what the file keeps; None where there is none, or where it has to be made anew.

    Raises UserError for a file of another kind, which is not ours to overwrite.
    """
    file = Path(path).expanduser()
    if not file.exists():
        return None
    try:
        with open(file, "rb") as opened:
            if OURS not in opened.read(1 << 16):
                raise UserError(
                    f"--preprocessed_path {path}: found a file of another kind; expected none, or "
                    "one that this flag has made. Give another file name."
                )
        whole = _is_whole(file)
        examples = Examples(pa.memory_map(str(file)).read_buffer()[:-CHECKSUM]) if whole else None
    except pa.ArrowException:
        examples = None
    except OSError as error:
        raise UserError(f"--preprocessed_path {path}: cannot be read: {error.strerror}.") from None
    known = examples is not None and examples.format == FORMAT
    if examples is not None and known and examples.key == _plain(key):
        return examples
    if not silent:
        why = _difference(examples.key, _plain(key)) if examples is not None else "damaged"
        print(f"note: --preprocessed_path {path}: {why}; made anew")
    return None


def write_cache(path: str, key: dict[str, Any], examples: Iterable[Example], tally: Tally) -> None:
    """Write the file whole or not at all, a batch of examples at a time.

    Raises UserError where it cannot be written.
    """
    file = Path(path).expanduser()
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "wb") as opened:
            summed = _Summed(opened)
            _write(summed, _plain(key), examples, tally)
            opened.write(summed.sum.to_bytes(CHECKSUM, "little"))
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def claimed(path: str) -> Iterator[None]:
    """Wait until no other process makes the file; the kernel ends the claim of one that dies.

    Raises UserError where nothing can be written.
    """
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = open(file.with_name(f".{file.name}.lock"), "w")  # noqa: SIM115
    except OSError as error:
        raise _unwritable(path, error) from None
    with lock:
        # Some network disks have no locks: then each makes the file, and the last one stays.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Summed:
    """A file that sums up what is written into it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum, self.closed = file, 0, False

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def tell(self) -> int:
        return self.file.tell()


def _is_whole(file: Path) -> bool:
    """Whether the bytes are those that were written; read, not mapped, to take no memory."""
    found, left = 0, file.stat().st_size - CHECKSUM
    with open(file, "rb") as opened:
        while left > 0 and (part := opened.read(min(left, 1 << 20))):
            found = zlib.crc32(part, found)
            left -= len(part)
        return opened.read() == found.to_bytes(CHECKSUM, "little")


def _write(sink: Any, key: dict[str, Any], examples: Iterable[Example], tally: Tally) -> None:
    facts = {"format": FORMAT, "key": json.dumps(key)}
    schema = pa.schema([*COLUMNS.items()], metadata=facts)
    rest = iter(examples)
    with pa.ipc.new_file(pa.PythonFile(sink, "w"), schema) as writer:
        while batch := [*islice(rest, BATCH)]:
            columns = [
                pa.array([getattr(example, name) for example in batch], kind)
                for name, kind in COLUMNS.items()
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
        # The account is known at the end only: it goes with a batch of no example.
        none = pa.record_batch([pa.array([], kind) for kind in COLUMNS.values()], schema=schema)
        account = {"tally": json.dumps([*vars(tally).values()])}
        writer.write_batch(none, custom_metadata=account)


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """Return the key as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return f"made of another {', '.join(changed)}" if changed else "of an older format"


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(
        f"--preprocessed_path {path}: cannot be written: {error.strerror}. Give another file, or "
        "leave it out."
    )
