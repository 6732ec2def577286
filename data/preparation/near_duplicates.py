"""Computes MinHash signatures of dialogues, to find near duplicates."""

import functools

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

PERMUTATIONS = 128
GRAM_WORDS = 5
MIN_WORDS = 50  # in a shorter dialogue, one word is too large a share
# A signature is computed only from the smallest hashes, which are also equal in similar sets. 128
# permutations of all grams would take most of the time.
SAMPLE_HASHES = 256
MAX_BYTES = 1 << 18  # bytes of a text that are read, to bound memory
BASE = 0x9E3779B1


def signature(text: str) -> bytes:
    """Return a signature [128] uint32 as bytes; empty for a text of fewer than 50 words."""
    words = _words(text)
    if len(words) < MIN_WORDS:
        return b""
    count = len(words) - GRAM_WORDS + 1
    grams = words[:count].copy()
    for offset in range(1, GRAM_WORDS):
        grams *= np.uint32(BASE)
        grams += words[offset : offset + count]
    hashes = np.sort(_mixed(grams))
    different = np.append(True, hashes[1:] != hashes[:-1])
    sketch = MinHash(PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32")
    sketch.update_batch(hashes[different][:SAMPLE_HASHES].tolist())
    return bytes(sketch.hashvalues.tobytes())


def _words(text: str) -> NDArray[np.uint32]:
    """Return a hash of each word [n] uint32; a character of a script without spaces is a word."""
    data = text.lower().encode("utf-8", "surrogatepass")[:MAX_BYTES]
    kind = np.frombuffer(data.translate(KINDS), np.uint8)
    begins = kind == 2
    begins[1:] |= (kind[1:] == 1) & (kind[:-1] == 0)
    begins[:1] |= kind[:1] == 1
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.zeros(0, np.uint32)
    # A word's hash is the sum of byte * BASE ** (offset in the word). One call computes all sums
    # with offsets in the text; the factor BASE ** -(start of the word) corrects them.
    powers, inverses = _powers()
    values = np.frombuffer(data.translate(VALUES), np.uint8)
    sums = np.add.reduceat(values * powers[: len(data)], starts, dtype=np.uint32)
    return _mixed(sums * inverses[starts])


def _mixed(hashes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Mix the bits (the finalizer of MurmurHash3)."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


@functools.cache
def _powers() -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return BASE ** n and BASE ** -n modulo 2 ** 32, for all n; an odd BASE has an inverse."""
    bases = (BASE, pow(BASE, -1, 1 << 32))
    one, two = (np.cumprod(np.full(MAX_BYTES, base), dtype=np.uint32) for base in bases)
    return one, two


@functools.cache
def _permutations() -> NDArray[np.uint32]:
    permutations: NDArray[np.uint32] = MinHash(PERMUTATIONS, scheme="affine32").permutations
    return permutations


def _kind(byte: int) -> int:
    """Return 0 for a byte of UTF-8 that separates words, 1 inside a word, 2 at its start."""
    if byte < 0x80:
        return int(chr(byte).isalnum())
    # A first byte from 0xE3 on: U+3000 and higher (Chinese, Japanese, Korean, emoji).
    return 2 if byte >= 0xE3 else 1


KINDS = bytes(map(_kind, range(256)))
VALUES = bytes(byte if KINDS[byte] else 0 for byte in range(256))
