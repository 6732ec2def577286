"""What a preparation has written and seen so far, on disk: it goes on from there after a kill."""

import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from data.files.read import plain
from data.preparation.duplicates import Seen

if TYPE_CHECKING:
    from data.preparation.job import Result

NAMED = 1000  # ids that are kept of each cause; beyond that there is a count
LONGEST_ID = 100  # characters
TABLES = "CREATE TABLE IF NOT EXISTS progress (key TEXT, state TEXT);"


class _Output:
    """A file of records on its way: a partial one beside it, of which so many bytes are sure."""

    stream: BinaryIO

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.array = path.suffix == ".json"
        self.kept = 0

    def write(self, record: dict[str, Any]) -> None:
        """Add a record."""
        line = _encoded(record)
        separator = (b",\n" if self.kept else b"[\n") if self.array else b""
        self.stream.write(separator + line + (b"" if self.array else b"\n"))
        self.kept += 1

    def sure(self) -> dict[str, int]:
        """Have all that was written outlast a kill, and return how much that is."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        return {"bytes": self.stream.tell(), "kept": self.kept}

    def finish(self) -> None:
        """Put the file in its place, whole."""
        if self.array:
            self.stream.write(b"\n]\n" if self.kept else b"[]\n")
        self.sure()
        self.partial.replace(self.path)


class Journal:
    """The partial outputs, and beside them the account and the fingerprints, in step.

    outputs: the file of what is kept and, where there is one, that of what is held out.
    Memory stays flat: what duplicates are known by lies in an SQLite file.
    """

    def __init__(self, outputs: list[Path], key: dict[str, Any], near_threshold: float) -> None:
        self.outputs = [_Output(path) for path in outputs]
        self.file = outputs[0].with_name(f".{outputs[0].name}.journal")
        self.near_threshold = near_threshold
        self.key = json.dumps({**key, "outputs": [path.name for path in outputs]}, sort_keys=True)
        self.done = self.read = 0
        self.dropped: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}
        self.noted: Counter[str] = Counter()

    def __enter__(self) -> "Journal":
        found = self._state()
        if found is None:
            self._remove()
        self.base = sqlite3.connect(self.file, isolation_level=None)
        self.base.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + TABLES)
        self.seen = Seen(self.base, self.near_threshold)
        self.base.execute("BEGIN")
        nothing = [{"bytes": 0, "kept": 0}] * len(self.outputs)
        sure = found["outputs"] if found else nothing
        for output, state in zip(self.outputs, sure, strict=True):
            output.stream = open(output.partial, "ab")
            output.stream.truncate(state["bytes"])
            output.stream.seek(0, os.SEEK_END)  # else tell() says what it said before
            output.kept = state["kept"]
        if found is None:
            self.base.execute("INSERT INTO progress VALUES (?, '')", (self.key,))
        else:
            self.done, self.read = found["done"], found["read"]
            self.dropped, self.noted = Counter(found["dropped"]), Counter(found["noted"])
            self.named = found["named"]
        return self

    def __exit__(self, *_: object) -> None:
        for output in self.outputs:
            output.stream.close()
        self.base.close()

    def _state(self) -> dict[str, Any] | None:
        """Return what an earlier run of the same has left, None where it left nothing of use."""
        if not all(file.exists() for file in (self.file, *(o.partial for o in self.outputs))):
            return None
        try:
            base = sqlite3.connect(self.file)
            with base:
                rows = base.execute("SELECT key, state FROM progress").fetchall()
            base.close()
            if len(rows) != 1 or rows[0][0] != self.key or not rows[0][1]:
                return None
            state: dict[str, Any] = json.loads(rows[0][1])
        except (sqlite3.Error, ValueError):
            return None
        pairs = zip(self.outputs, state["outputs"], strict=True)
        whole = all(output.partial.stat().st_size >= sure["bytes"] for output, sure in pairs)
        return state if whole else None

    def add(self, result: "Result") -> None:
        """Write what the record gives, unless it is a duplicate, and count it."""
        self.done += 1
        cause = self.seen.cause(result.exact, result.near) if result.records else None
        dropped = result.dropped
        if cause:
            dropped += (cause,) * len(result.records)
        else:
            for record in result.records:
                self.outputs[result.held_out].write(record)
            self.noted.update(result.noted)
        self.read += len(result.records) + len(result.dropped)
        for one in dropped:
            self.dropped[one] += 1
            named = self.named.setdefault(one, [])
            if len(named) < NAMED:
                named.append(result.id.encode("utf-8", "replace").decode()[:LONGEST_ID])

    def commit(self) -> None:
        """Have all that was added until now outlast a kill."""
        state = {
            "outputs": [output.sure() for output in self.outputs],
            **{name: getattr(self, name) for name in ("done", "read")},
            **{name: getattr(self, name) for name in ("dropped", "noted", "named")},
        }
        self.base.execute("UPDATE progress SET state = ?", (json.dumps(state),))
        self.base.execute("COMMIT")
        self.base.execute("BEGIN")

    def account(self) -> dict[str, Any]:
        """Return read, kept and dropped: by cause the ids, or a count where there are many."""
        dropped: dict[str, Any] = {}
        for cause, count in sorted(self.dropped.items()):
            named = self.named[cause]
            dropped[cause] = named if len(named) == count else count
        noted = dict(sorted(self.noted.items()))
        kept = [output.kept for output in self.outputs]
        held_out = {"held_out": kept[1]} if len(kept) > 1 else {}
        account = {"read": self.read, "kept": sum(kept), **held_out}
        return {**account, "dropped": dropped, "noted": noted}

    def finish(self) -> None:
        """Put the outputs in their places, whole, and remove what was beside them."""
        for output in reversed(self.outputs):  # The first that is there says that all are.
            output.finish()
        self.base.close()
        self._remove()

    def _remove(self) -> None:
        for tail in ("", "-wal", "-shm"):  # SQLite would read another file's into a new one
            self.file.with_name(self.file.name + tail).unlink(missing_ok=True)


def _encoded(record: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except ValueError:  # NaN and Infinity: Python reads them, but they are no JSON
        record = plain(record)
        text = json.dumps(record, ensure_ascii=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:  # Half a surrogate pair is no UTF-8; escaped it can be read again.
        return json.dumps(record).encode("ascii")
