"""Stores encoded examples as Arrow columns, in memory or in a file.

A cache file is an Arrow IPC file, followed by the offset and the checksum of its last part. There
is one part per record batch. The last part is empty; its metadata has the tally and the checksums
of the other parts. A batch is checked when it is first read. So a file of any size opens at once
and takes little memory.
"""

import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from heapq import nlargest
from importlib.metadata import version
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data.dialogues.conversation import Dialogue
from data.dialogues.sharegpt import Tally
from data.encoding.encode import Example
from data.errors import RunError, UserError
from data.files.hashes import value_sha256
from data.files.lock import locked

FORMAT = "lora-loop encoded data 6"  # raise it when the layout of a file changes
OURS = FORMAT[:22].encode()
# Ids depend on the key, on these modules of the package, and on these libraries.
ROOT = Path(__file__).parents[1]  # the package `data`
CODE = (
    *("dialogues/blocks", "dialogues/columns", "dialogues/conversation", "dialogues/exports"),
    *("dialogues/formats", "dialogues/forms", "dialogues/keys", "dialogues/pairs"),
    *("dialogues/preference", "dialogues/sharegpt", "dialogues/sources", "dialogues/tools"),
    *("dialogues/turns", "dialogues/values"),
    *("encoding/chat_answers", "encoding/chat_template", "encoding/control_tokens"),
    *("encoding/encode", "encoding/encoder", "encoding/seq2seq", "encoding/templates"),
    *("encoding/token_offsets", "encoding/tokenizer"),
    "errors",
    *("files/containers", "files/json_file", "files/json_loose", "files/json_stream"),
    *("files/names", "files/read", "files/refusals", "files/splits", "files/tables"),
)
LIBRARIES = ("tokenizers", "transformers")
BATCH = 1024  # examples in a record batch, and in memory while a file is written
COLUMNS = {
    "id": pa.string(),
    "input_ids": pa.list_(pa.int32()),
    "labels": pa.list_(pa.int32()),
    "supervised_tokens": pa.int32(),
    "record": pa.int64(),
    "is_pair": pa.bool_(),
    "share": pa.float64(),
    "turn": pa.int32(),
}
SCHEMA = pa.schema([*COLUMNS.items()])
COUNTERS = ("dropped", "noted", "closers", "unused")  # of a tally
SIDES = ("input_ids", "labels")
PLACE, CHECKSUM = 8, 4  # bytes at the end of a file: offset and checksum of its last part


class CorruptCache(Exception):
    """The bytes of the file differ from those that were written."""


class Examples(Sequence[Example]):
    """Examples in Arrow record batches, in memory or memory-mapped; `tally` counts their records.

    Raises CorruptCache if the last part is damaged.
    """

    def __init__(self, source: Any, file: Path | None = None) -> None:
        self.source, self.file = source, file
        end = len(source) - PLACE - CHECKSUM
        place, checksum = source[end : end + PLACE], source[end + PLACE :]
        begin, expected = (int.from_bytes(bytes(word), "little") for word in (place, checksum))
        if begin > end or zlib.crc32(source[begin : end + PLACE]) != expected:
            raise CorruptCache
        self.reader = pa.ipc.open_file(source[:end])
        last = self.reader.num_record_batches - 1
        found = self.reader.get_batch_with_custom_metadata(last)[1]
        tally = json.loads(found[b"tally"])
        counters = {
            name: Counter(tally[name]) for name in ("dropped", "noted", "closers", "unused")
        }
        self.tally = Tally(**{**tally, **counters})
        self.parts: list[list[int]] = json.loads(found[b"parts"])
        self.total = int(found[b"count"])
        self.key = json.loads(self.reader.schema.metadata[b"key"])
        self.batches: dict[int, Any] = {}
        self.places: Sequence[int] = range(self.total)

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Return an example with its ids as lists; raises RunError if its batch is damaged."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = self.places[index]
        number, row = divmod(place, BATCH)
        values = [column[row] for column in self._batch(number).columns]
        ids, labels = (value.values.to_numpy().tolist() for value in values[1:3])
        name, *rest = (values[n].as_py() for n in (0, 3, 4, 5, 6, 7))
        return Example(name, ids, labels, *rest)

    def held_out(self, fraction: float) -> tuple["Examples", "Examples"]:
        """Return the training examples and the held-out ones; the dialogue's `share` decides."""
        batches = map(self.reader.get_batch, range(len(self.parts)))
        shares = [share for batch in batches for share in batch.column("share").to_pylist()]
        both = copy(self), copy(self)
        for held_out, part in enumerate(both):
            part.places = [i for i in self.places if (shares[i] < fraction) == held_out]
        return both

    def records(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return each example's record, and whether it is an example of one answer: [N] each.

        Only these two columns are read.
        """
        batches = [*map(self.reader.get_batch, range(len(self.parts)))]
        records = [batch.column("record").to_numpy() for batch in batches]
        turns = [batch.column("turn").is_valid().to_numpy(False) for batch in batches]
        places = np.asarray(self.places, np.int64)
        return np.concatenate(records)[places], np.concatenate(turns)[places]

    def longest(self, count: int) -> list[Example]:
        """Return the longest examples; the length of a pair is the sum of its sides.

        Only the lengths of the other examples are read.
        """
        lengths: list[int] = []
        for number in range(len(self.parts)):
            columns = self.reader.get_batch(number)
            sides = [columns.column(name).value_lengths() for name in COLUMNS if name in SIDES]
            pairs = columns.column("is_pair").to_pylist()
            rows = zip(*(side.to_pylist() for side in sides), pairs, strict=True)
            lengths += [ids + labels * is_pair for ids, labels, is_pair in rows]
        order = nlargest(count, range(len(self)), key=lambda i: lengths[self.places[i]])
        return [self[i] for i in order]

    def largest_id(self) -> tuple[int, str]:
        """Return the largest token id, and the id of an example that has it; (-1, "") if empty."""
        largest, example = -1, ""
        for number in range(len(self.parts)):
            for name in SIDES:
                top = pc.max(self.reader.get_batch(number).column(name).values).as_py()
                if top is not None and top > largest:
                    columns = self._batch(number)  # raises RunError for a damaged batch
                    ids = columns.column(name)
                    row = next(n for n, value in enumerate(ids) if top in value.values.to_numpy())
                    largest, example = top, columns.column(0)[row].as_py()
        return largest, example

    def record_batches(self) -> Iterator[Any]:
        """Yield the file's record batches; raises RunError for a damaged one."""
        return map(self._batch, range(len(self.parts)))

    def _batch(self, number: int) -> Any:
        """Return a batch; its checksum is verified on the first call."""
        if number not in self.batches:
            begin, end, checksum = self.parts[number]
            if zlib.crc32(self.source[begin:end]) != checksum:
                raise self._fault(number)
            self.batches[number] = self.reader.get_batch(number)
        return self.batches[number]

    def _fault(self, number: int) -> RunError:
        first = number * BATCH
        found = f"examples {first} to {min(first + BATCH, self.total) - 1} are damaged"
        if self.file is None:
            return RunError(f"{found} in memory.")
        with suppress(OSError):
            self.file.unlink()
        return RunError(f"--preprocessed_path {self.file}: {found}. It was removed; run again.")


def in_memory(examples: Iterable[Example], tally: Tally) -> Examples:
    """Return the examples in memory; lists of Python integers would take ten times as much."""
    sink = BytesIO()
    _write(sink, {}, _batches(examples), tally)
    return Examples(pa.py_buffer(sink.getvalue()))


def read_cache(path: str, key: dict[str, Any], silent: bool = False) -> Examples | None:
    """Return the examples of the file; None if it is missing or has to be encoded again.

    Raises UserError for an unreadable file, and for a file of another kind: it must not be
    overwritten.
    """
    file = Path(path).expanduser()
    if not file.exists():
        return None
    try:
        with open(file, "rb") as opened:
            head = opened.read(1 << 16)
        if OURS not in head:
            raise UserError(
                f"--preprocessed_path {path}: found a file of another kind; expected no file, or "
                "one that this flag has written. Give another file name."
            )
        why = "an older format"
        if FORMAT.encode() in head:
            examples = Examples(pa.memory_map(str(file)).read_buffer(), file)
            why = _difference(examples.key, _plain(key))
    except (pa.ArrowException, CorruptCache):
        why = "damaged"
    except OSError as error:
        raise UserError(f"--preprocessed_path {path}: cannot be read: {error.strerror}.") from None
    if not why:
        return examples
    if not silent:
        print(f"note: --preprocessed_path {path}: {why}; encoded again")
    return None


def write_cache(path: str, key: dict[str, Any], examples: Iterable[Example], tally: Tally) -> None:
    """Write the examples atomically, in batches; raises UserError like `write_batches`."""
    write_batches(path, key, _batches(examples), tally)


def write_batches(path: str, key: dict[str, Any], batches: Iterable[Any], tally: Tally) -> None:
    """Write record batches atomically; all but the last must have BATCH rows.

    Raises UserError if the file cannot be written.
    """
    file = Path(path).expanduser()
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "wb") as opened:
            _write(opened, _plain(key), batches, tally)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def locked_cache(path: str) -> Iterator[None]:
    """Wait for the lock of the file, and hold it.

    Raises UserError if the lock file cannot be created.
    """
    file = Path(path).expanduser()
    with ExitStack() as stack:
        try:
            # On a file system without locks, each process writes the file and the last one wins.
            stack.enter_context(locked(file.with_name(f".{file.name}.lock")))
        except OSError as error:
            raise _unwritable(path, error) from None
        yield


class _Checksummed:
    """A file that computes a checksum of each written part."""

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


def _write(file: Any, key: dict[str, Any], batches: Iterable[Any], tally: Tally) -> None:
    facts = {"format": FORMAT, "key": json.dumps(key)}
    count, sink = 0, _Checksummed(file)
    with pa.ipc.new_file(pa.PythonFile(sink, "w"), SCHEMA.with_metadata(facts)) as writer:
        for batch in batches:
            count += batch.num_rows
            writer.write_batch(batch)
            sink.end_part()
        # The tally is known only at the end: it is metadata of an empty batch.
        last = {"tally": json.dumps(vars(tally)), "count": str(count)}
        last["parts"] = json.dumps(sink.parts)
        writer.write_batch(_arrow([]), custom_metadata=last)
    sink.write(sink.begin.to_bytes(PLACE, "little"))
    file.write(sink.sum.to_bytes(CHECKSUM, "little"))


def _batches(examples: Iterable[Example]) -> Iterator[Any]:
    rest = iter(examples)
    while batch := [*islice(rest, BATCH)]:
        yield _arrow(batch)


def _arrow(examples: Sequence[Example]) -> Any:
    columns = {name: [getattr(example, name) for example in examples] for name in COLUMNS}
    return pa.RecordBatch.from_pydict(columns, SCHEMA)


def _plain(key: dict[str, Any]) -> dict[str, Any]:
    """Return the key after a JSON round trip, with the hash of CODE and the library versions."""
    plain: dict[str, Any] = json.loads(json.dumps(key))
    return {**plain, "code": _code_sha256(), **{name: version(name) for name in LIBRARIES}}


def _code_sha256() -> str:
    return value_sha256("code", {name: (ROOT / f"{name}.py").read_bytes() for name in CODE})


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return f"encoded with other {', '.join(changed)}" if changed else ""


def _unwritable(path: str, error: OSError) -> UserError:
    return UserError(
        f"--preprocessed_path {path}: cannot be written: {error.strerror}. Give another file, or "
        "leave the flag out."
    )


PIECE = 16_384  # dialogues in a piece; a killed run loses one piece at most
Piece = tuple[str, dict[str, Any], int]  # file, key, number of dialogues before it
# Yields the examples of dialogues, and counts them in the tally.
Encode = Callable[[Iterator[Dialogue], Tally], Iterator[Example]]


def encode_in_pieces(
    path: str,
    key: dict[str, Any],
    dialogues: Iterable[Dialogue],
    encode: Encode,
    tally: Tally,
    size: int = PIECE,
) -> None:
    """Encode the dialogues in pieces, and write all examples to the file, like `write_cache`.

    Pieces that an earlier run with this key has finished are not encoded again. Their dialogues are
    only read. tally: has the counts of the reader; the counts of encoding are added.

    Raises UserError if the file cannot be written, RunError for a damaged piece.
    """
    file = Path(path).expanduser()
    pieces: list[Piece] = []
    rest, done, reused = iter(dialogues), 0, 0
    while True:
        name = str(file.with_name(f"{_prefix(file)}{len(pieces)}"))
        of_piece = {**key, "piece": len(pieces), "dialogues": size}
        some = _Counted(islice(rest, size))
        kept = read_cache(name, of_piece, silent=True)
        if kept is not None:
            deque(some, maxlen=0)
            reused += some.count
        else:
            if reused:
                print(f"encoding: resumed after dialogue {reused:,}")
                reused = 0
            counted = Tally()
            write_cache(name, of_piece, encode(some, counted), counted)
            kept = _opened(name, of_piece)
        tally.add(kept.tally)
        pieces.append((name, of_piece, done))
        done += some.count
        if some.count < size:
            break
    write_batches(path, key, _joined(pieces), tally)
    for piece in file.parent.iterdir():
        if piece.name.startswith(_prefix(file)):
            with suppress(OSError):
                piece.unlink()


def _prefix(file: Path) -> str:
    return f".{file.name}.piece-"


class _Counted:
    """An iterator of dialogues that counts them."""

    def __init__(self, dialogues: Iterator[Dialogue]) -> None:
        self.dialogues, self.count = dialogues, 0

    def __iter__(self) -> Iterator[Dialogue]:
        return self

    def __next__(self) -> Dialogue:
        dialogue = next(self.dialogues)
        self.count += 1
        return dialogue


def _opened(name: str, key: dict[str, Any]) -> Examples:
    kept = read_cache(name, key)
    if kept is None:  # a file system without locks
        raise UserError(f"{name}: the file changed while it was used. Run again.")
    return kept


def _joined(pieces: Sequence[Piece]) -> Iterator[Any]:
    """Yield the record batches of all pieces; all but the last have BATCH rows.

    `record` becomes an index in the whole data. One piece is open at a time, because the pages of
    a mapped file count as memory of this process.
    """
    waiting: list[Any] = []
    for name, key, before in pieces:
        for batch in _opened(name, key).record_batches():
            place = batch.schema.get_field_index("record")
            moved = pc.add(batch.column(place), pa.scalar(before, pa.int64()))
            waiting.append(batch.set_column(place, batch.schema.field(place), moved))
            while sum(part.num_rows for part in waiting) >= BATCH:
                table = pa.Table.from_batches(waiting)
                yield _one(table.slice(0, BATCH))
                waiting = table.slice(BATCH).to_batches()
    if any(part.num_rows for part in waiting):
        yield _one(pa.Table.from_batches(waiting))


def _one(table: Any) -> Any:
    """Return the table as one record batch."""
    (batch,) = table.combine_chunks().to_batches()
    return batch
