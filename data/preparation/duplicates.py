"""Knows dialogues that were there before, exactly or nearly, by an SQLite file: flat memory."""

import sqlite3
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

BANDS = 16
TABLES = """
CREATE TABLE IF NOT EXISTS exact (digest BLOB PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS near (band INTEGER PRIMARY KEY, signature INTEGER);
CREATE TABLE IF NOT EXISTS signatures (number INTEGER PRIMARY KEY, value BLOB);
"""
NEAR = "near duplicate"


class Seen:
    """The digests and signatures of those that were not seen before; tables of a base.

    near_threshold: the share of a signature that two must have alike.
    """

    def __init__(self, base: sqlite3.Connection, near_threshold: float) -> None:
        self.base, self.near_threshold = base, near_threshold
        base.executescript(TABLES)

    def cause(self, exact: Iterable[tuple[str, bytes]], near: bytes) -> str | None:
        """Return the first cause that was seen before; where there is none, this is seen now.

        exact: (cause, digest) pairs. near: a MinHash signature [n] uint32 as bytes.
        """
        exact = [*exact]
        for cause, digest in exact:
            if self.base.execute("SELECT 1 FROM exact WHERE digest = ?", (digest,)).fetchone():
                return cause
        signature = np.frombuffer(near, np.uint32)
        bands = _bands(signature) if len(signature) else []
        if self._near(signature, bands):
            return NEAR
        digests = [(digest,) for _, digest in exact]
        self.base.executemany("INSERT OR IGNORE INTO exact VALUES (?)", digests)
        if bands:
            added = self.base.execute("INSERT INTO signatures (value) VALUES (?)", (near,))
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


def digest(parts: Iterable[str]) -> bytes:
    """Return 16 bytes that tell these texts from all others."""
    made = blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        made.update(f"{len(encoded)}:".encode() + encoded)
    return made.digest()


def _bands(signature: NDArray[np.uint32]) -> list[int]:
    """Return a number for each band of the signature; near duplicates share one at least."""
    rows = signature.reshape(BANDS, -1).astype(np.uint64)
    mixed = np.arange(1, BANDS + 1, dtype=np.uint64)
    for column in rows.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return [int(number) for number in mixed.view(np.int64)]
