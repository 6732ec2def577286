"""What a preparation has written and seen so far, on disk: it goes on from there after a kill."""

import json
import os
import sqlite3
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from data.jobs import Result

NAMED = 1000  # ids that are kept of each cause; beyond that there is a count
BANDS = 16
TABLES = """
CREATE TABLE IF NOT EXISTS progress (key TEXT, state TEXT);
CREATE TABLE IF NOT EXISTS exact (digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS near (band INTEGER PRIMARY KEY, signature INTEGER);
CREATE TABLE IF NOT EXISTS signatures (number INTEGER PRIMARY KEY, value BLOB);
"""
NEAR = "near duplicate"


class Journal:
    """The partial output, and beside it the account and the fingerprints, in step with each other.

    Memory stays flat: what duplicates are known by lies in an SQLite file.
    """

    def __init__(self, out: Path, key: dict[str, Any], near_threshold: float) -> None:
        self.partial = out.with_name(f".{out.name}.partial")
        self.file = out.with_name(f".{out.name}.journal")
        self.array = out.suffix == ".json"
        self.near_threshold = near_threshold
        self.key = json.dumps(key, sort_keys=True)
        self.done = self.read = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}
        self.noted: Counter[str] = Counter()

    def __enter__(self) -> "Journal":
        found = self._state()
        if found is None:
            self.file.unlink(missing_ok=True)
            self.partial.unlink(missing_ok=True)
        self.base = sqlite3.connect(self.file, isolation_level=None)
        self.base.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;" + TABLES)
        self.base.execute("BEGIN")
        self.output = open(self.partial, "ab")
        if found is None:
            self.base.execute("INSERT INTO progress VALUES (?, '')", (self.key,))
        else:
            self.output.truncate(found["bytes"])
            self.done, self.read, self.kept = found["done"], found["read"], found["kept"]
            self.dropped, self.noted = Counter(found["dropped"]), Counter(found["noted"])
            self.named = found["named"]
        return self

    def __exit__(self, *_: object) -> None:
        self.output.close()
        self.base.close()

    def _state(self) -> dict[str, Any] | None:
        """Return what an earlier run of the same has left, None where it left nothing of use."""
        if not self.file.exists() or not self.partial.exists():
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
        return state if self.partial.stat().st_size >= state["bytes"] else None

    def add(self, result: "Result") -> None:
        """Write what the record gives, unless it is a duplicate, and count it."""
        self.done += 1
        cause = self._seen(result) if result.records else None
        dropped = result.dropped
        if cause:
            dropped += (cause,) * len(result.records)
        else:
            for record in result.records:
                line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")
                separator = (b",\n" if self.kept else b"[\n") if self.array else b""
                self.output.write(separator + line + (b"" if self.array else b"\n"))
                self.kept += 1
            self.noted.update(result.noted)
        self.read += len(result.records) + len(result.dropped)
        for one in dropped:
            self.dropped[one] += 1
            named = self.named.setdefault(one, [])
            if len(named) < NAMED:
                named.append(result.id)

    def _seen(self, result: "Result") -> str | None:
        for cause, digest in result.exact:
            if self.base.execute("SELECT 1 FROM exact WHERE digest = ?", (digest,)).fetchone():
                return cause
        signature = np.frombuffer(result.near, np.uint32)
        bands = _bands(signature) if len(signature) else []
        if self._near(signature, bands):
            return NEAR
        digests = [(digest,) for _, digest in result.exact]
        self.base.executemany("INSERT OR IGNORE INTO exact VALUES (?)", digests)
        if bands:
            added = self.base.execute("INSERT INTO signatures (value) VALUES (?)", (result.near,))
            rows = [(band, added.lastrowid) for band in bands]
            self.base.executemany("INSERT OR IGNORE INTO near VALUES (?, ?)", rows)
        return None

    def _near(self, signature: NDArray[np.uint32], bands: list[int]) -> bool:
        if not bands:
            return False
        marks = ",".join("?" * len(bands))
        found = self.base.execute(
            "SELECT DISTINCT value FROM near JOIN signatures ON signature = number "
            f"WHERE band IN ({marks})",
            bands,
        )
        alike = (np.mean(np.frombuffer(value, np.uint32) == signature) for (value,) in found)
        return any(share >= self.near_threshold for share in alike)

    def commit(self) -> None:
        """Have all that was added until now outlast a kill."""
        self.output.flush()
        os.fsync(self.output.fileno())
        state = {
            "bytes": self.output.tell(),
            **{name: getattr(self, name) for name in ("done", "read", "kept")},
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
        return {"read": self.read, "kept": self.kept, "dropped": dropped, "noted": noted}

    def finish(self, out: Path) -> None:
        """Put the output in its place, whole, and remove what was beside it."""
        if self.array:
            self.output.write(b"\n]\n" if self.kept else b"[]\n")
        self.output.flush()
        os.fsync(self.output.fileno())
        self.partial.replace(out)
        self.base.close()
        for file in self.file.parent.glob(f"{self.file.name}*"):
            file.unlink()


def _bands(signature: NDArray[np.uint32]) -> list[int]:
    """Return a number for each band of the signature; near duplicates share one at least."""
    rows = signature.reshape(BANDS, -1).astype(np.uint64)
    mixed = np.arange(1, BANDS + 1, dtype=np.uint64)
    for column in rows.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return [int(number) for number in mixed.view(np.int64)]
