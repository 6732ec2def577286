"""Keeps encoded examples in Arrow's columns: in memory, or in a file for as long as it fits.

A file is Arrow's own form, and behind it its last part's place and checksum. That part holds the
account and the checksums of the others, each with one batch: they are checked when first read. So
a file of any size is open at once, in little memory.
"""

import fcntl
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

import pyarrow as pa

from data.encode import Example
from data.errors import Fault, UserError
from data.sharegpt import Tally

FORMAT = "lora-loop encoded data 3"  # to be raised when the same key would give other ids
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
PLACE, CHECKSUM = 8, 4  # bytes at a file's end: where its last part begins, and that part's sum


class Damaged(Exception):
    """Bytes that are not those that were written."""


class Examples(Sequence[Example]):
    """Examples in Arrow's record batches, read where they lie; `tally` is the account of all.

    Raises Damaged where the account is not as it was written.
    """

    def __init__(self, source: Any, file: Path | None = None) -> None:
        self.source, self.file = source, file
        end = len(source) - PLACE - CHECKSUM
        place, checksum = bytes(source[end : end + PLACE]), bytes(source[end + PLACE :])
        begin = int.from_bytes(place, "little")
        if begin > end or _sum(source[begin : end + PLACE]) != checksum:
            raise Damaged
        self.reader = pa.ipc.open_file(source[:end])
        last = self.reader.num_record_batches - 1
        found = self.reader.get_batch_with_custom_metadata(last)[1]
        read, kept, dropped, noted, named, answers, ended = json.loads(found[b"tally"])
        self.tally = Tally(read, kept, Counter(dropped), Counter(noted), named, answers, ended)
        self.parts: list[list[int]] = json.loads(found[b"parts"])
        self.total = int(found[b"count"])
        self.key = json.loads(self.reader.schema.metadata[b"key"])
        self.batches: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return an example, its ids as lists; raises Fault where they have been damaged."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        number, row = divmod(place, BATCH)
        values = [column[row] for column in self._batch(number).columns]
        ids, labels = (value.values.to_numpy().tolist() for value in values[1:3])
        name, supervised, record, is_pair = (values[n].as_py() for n in (0, 3, 4, 5))
        return Example(name, ids, labels, supervised, record, is_pair)

    def _batch(self, number: int) -> Any:
        """Return a batch; when it is first read its bytes must be those that were written."""
        if number not in self.batches:
            begin, end, checksum = self.parts[number]
            if zlib.crc32(self.source[begin:end]) != checksum:
                raise self._fault(number)
            self.batches[number] = self.reader.get_batch(number)
        return self.batches[number]

    def _fault(self, number: int) -> Fault:
        first = number * BATCH
        found = f"examples {first} to {min(first + BATCH, self.total) - 1} are damaged"
        if self.file is None:
            return Fault(f"{found} in memory.")
        with suppress(OSError):
            self.file.unlink()
        return Fault(f"--preprocessed_path {self.file}: {found}. It is removed: run again.")


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
            head = opened.read(1 << 16)
        if OURS not in head:
            raise UserError(
                f"--preprocessed_path {path}: found a file of another kind; expected none, or "
                "one that this flag has made. Give another file name."
            )
        why = "of an older format"
        if FORMAT.encode() in head:
            examples = Examples(pa.memory_map(str(file)).read_buffer(), file)
            why = _difference(examples.key, _plain(key))
    except (pa.ArrowException, Damaged):
        why = "damaged"
    except OSError as error:
        raise UserError(f"--preprocessed_path {path}: cannot be read: {error.strerror}.") from None
    if not why:
        return examples
    if not silent:
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
            _write(opened, _plain(key), examples, tally)
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
    """A file that sums up what is written into it, part by part."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum, self.begin, self.closed = file, 0, 0, False
        self.parts: list[list[int]] = []

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def tell(self) -> int:
        return self.file.tell()

    def end_part(self) -> None:
        self.parts.append([self.begin, self.tell(), self.sum])
        self.begin, self.sum = self.tell(), 0


def _sum(data: Any) -> bytes:
    return zlib.crc32(data).to_bytes(CHECKSUM, "little")


def _write(file: Any, key: dict[str, Any], examples: Iterable[Example], tally: Tally) -> None:
    facts = {"format": FORMAT, "key": json.dumps(key)}
    schema = pa.schema([*COLUMNS.items()], metadata=facts)
    rest, count, sink = iter(examples), 0, _Summed(file)
    with pa.ipc.new_file(pa.PythonFile(sink, "w"), schema) as writer:
        while batch := [*islice(rest, BATCH)]:
            count += len(batch)
            writer.write_batch(_arrow(batch, schema))
            sink.end_part()
        # The account is known at the end only: it goes with a batch of no example.
        account = {"tally": json.dumps([*vars(tally).values()]), "count": str(count)}
        account["parts"] = json.dumps(sink.parts)
        writer.write_batch(_arrow([], schema), custom_metadata=account)
    sink.write(sink.begin.to_bytes(PLACE, "little"))
    file.write(sink.sum.to_bytes(CHECKSUM, "little"))


def _arrow(examples: Sequence[Example], schema: Any) -> Any:
    columns = [
        pa.array([getattr(example, name) for example in examples], kind)
        for name, kind in COLUMNS.items()
    ]
    return pa.record_batch(columns, schema=schema)


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """Return the key as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return plain


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return f"made of another {', '.join(changed)}" if changed else ""


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(
        f"--preprocessed_path {path}: cannot be written: {error.strerror}. Give another file, or "
        "leave it out."
    )
