"""MinHash signatures of dialogues, by which those that differ in little are known."""

import functools

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

PERMUTATIONS = 128
GRAM = 5  # words
FEWEST = 50  # words; in shorter dialogues one word is too large a share
# Only so many of the smallest hashes go into a signature: two sets that are alike agree in these,
# too, and the 128 permutations of every gram would take most of the time.
SAMPLE = 512
LONGEST = 1 << 20  # bytes that are looked at, so that memory is bounded
BASE = 0x9E3779B97F4A7C15
SPREAD = np.uint64(0xFF51AFD7ED558CCD)


def signature(text: str) -> bytes:
    """Return 128 uint32 as bytes, nothing for a text of fewer than 50 words."""
    words = _words(text)
    if len(words) < FEWEST:
        return b""
    count = len(words) - GRAM + 1
    grams = np.zeros(count, np.uint64)
    for offset in range(GRAM):
        grams = grams * np.uint64(BASE) + words[offset : offset + count]
    hashes = np.unique((_mixed(grams) >> np.uint64(32)).astype(np.uint32))[:SAMPLE]
    sketch = MinHash(PERMUTATIONS, hashfunc=int, permutations=_permutations(), scheme="affine32")
    sketch.update_batch(hashes.tolist())
    return bytes(sketch.hashvalues.tobytes())


def _words(text: str) -> NDArray[np.uint64]:
    """Return a hash of each word; a sign of a script without spaces is a word of its own."""
    data = np.frombuffer(text.lower().encode("utf-8", "surrogatepass")[:LONGEST], np.uint8)
    kind = KINDS[data]
    before = np.zeros_like(kind)
    before[1:] = kind[:-1]
    starts = np.flatnonzero((kind == 2) | ((kind == 1) & (before == 0)))
    if not len(starts):
        return np.zeros(0, np.uint64)
    # sum of byte * BASE ** offset, from sums over the whole text: numpy has no loop over words.
    powers, inverses = _powers()
    sums = np.add.reduceat(VALUES[data] * powers[: len(data)], starts)
    return _mixed(sums * inverses[starts])


def _mixed(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    hashes = (hashes ^ (hashes >> np.uint64(33))) * SPREAD
    return hashes ^ (hashes >> np.uint64(29))


@functools.cache
def _powers() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return BASE ** n and BASE ** -n modulo 2 ** 64; BASE is odd, so that it has an inverse."""
    bases = (BASE, pow(BASE, -1, 1 << 64))
    one, two = (np.cumprod(np.full(LONGEST, base, np.uint64), dtype=np.uint64) for base in bases)
    return one, two


@functools.cache
def _permutations() -> NDArray[np.uint32]:
    made: NDArray[np.uint32] = MinHash(PERMUTATIONS, scheme="affine32").permutations
    return made


def _kinds() -> NDArray[np.uint8]:
    """Return of each byte of UTF-8 whether it parts words (0), is in one (1) or begins one (2)."""
    kinds = np.zeros(256, np.uint8)
    for byte in range(128):
        kinds[byte] = chr(byte).isalnum()
    kinds[128:] = 1
    kinds[0xE3:] = 2  # From U+3000 on: Chinese, Japanese, Korean; emoji.
    return kinds


KINDS = _kinds()
VALUES = np.where(KINDS > 0, np.arange(1, 257), 0).astype(np.uint64)
