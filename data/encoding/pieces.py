"""Encodes data piece by piece, each in a file until all are one, so that a killed run goes on."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data.dialogues.sharegpt import Dialogue, Tally
from data.encoding.cache import BATCH, Examples, read_cache, write_batches, write_cache
from data.encoding.encode import Example
from data.errors import UserError

PIECE = 16_384  # dialogues: what a kill may cost
Piece = tuple[str, dict[str, Any], int]  # its file, its key, the dialogues before it
# Yields the examples of dialogues, and counts them.
Encode = Callable[[Iterator[Dialogue], Tally], Iterator[Example]]


def encode_in_pieces(
    path: str,
    key: dict[str, Any],
    dialogues: Iterable[Dialogue],
    encode: Encode,
    tally: Tally,
    size: int = PIECE,
) -> None:
    """Encode the dialogues and keep all examples in the file, as `write_cache` does.

    Pieces that an earlier run with this key has kept are not encoded again; their dialogues are
    only read. tally: of what reads the dialogues; what encoding counts is added.

    Raises UserError where the file cannot be written, Fault for a piece that was damaged since.
    """
    file = Path(path).expanduser()
    pieces: list[Piece] = []
    rest, done, taken = iter(dialogues), 0, 0
    while True:
        name = str(file.with_name(f"{_prefix(file)}{len(pieces)}"))
        of_piece = {**key, "piece": len(pieces), "dialogues": size}
        some = _Counted(islice(rest, size))
        kept = read_cache(name, of_piece, silent=True)
        if kept is not None:
            deque(some, maxlen=0)
            taken += some.count
        else:
            if taken:
                print(f"encoding: going on behind dialogue {taken:,}")
                taken = 0
            account = Tally()
            write_cache(name, of_piece, encode(some, account), account)
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
    """Dialogues, and how many of them have been taken."""

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
    if kept is None:  # on a disk without locks
        raise UserError(f"{name}: it changes while it is used. Run again.")
    return kept


def _joined(pieces: Sequence[Piece]) -> Iterator[Any]:
    """Yield all pieces' record batches, full ones but for the last; `record` counts over all.

    One piece is open at a time: the pages of a mapped file count as this process' memory.
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
