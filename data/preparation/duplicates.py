"""Finds exact and near duplicates of earlier dialogues, in constant memory (SQLite)."""

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
    """Tables with the digests and signatures of the distinct dialogues so far.

    near_threshold: minimum share of equal signature values that makes a near duplicate.
    """

    def __init__(self, base: sqlite3.Connection, near_threshold: float) -> None:
        self.base, self.near_threshold = base, near_threshold
        base.executescript(TABLES)

    def cause(self, exact: Iterable[tuple[str, bytes]], near: bytes) -> str | None:
        """Return the first cause for which a dialogue is a duplicate; if None, add the dialogue.

        exact: (cause, digest) pairs of the dialogue. near: its MinHash signature [n] uint32 as
        bytes.
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
        shares = (np.mean(np.frombuffer(value, np.uint32) == signature) for (value,) in found)
        return any(share >= self.near_threshold for share in shares)


def digest(parts: Iterable[str]) -> bytes:
    """Return a 16-byte digest of a sequence of texts."""
    hashed = blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        hashed.update(f"{len(encoded)}:".encode() + encoded)
    return hashed.digest()


def _bands(signature: NDArray[np.uint32]) -> list[int]:
    """Return a hash of each band of the signature; near duplicates very likely share one."""
    rows = signature.reshape(BANDS, -1).astype(np.uint64)
    mixed = np.arange(1, BANDS + 1, dtype=np.uint64)
    for column in rows.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return [int(number) for number in mixed.view(np.int64)]
