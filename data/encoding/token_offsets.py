"""Locates tokens in a text by the bytes of each token, which is a third faster than by offsets.

Offsets take two Python integers per token, and the fastest call of the tokenizers library returns
none. Each text is verified: it must equal the concatenated bytes of its tokens.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from data.encoding.chat_answers import Span
from data.encoding.templates import Rendered

# Starts and ends (exclusive) of all tokens, in characters or in bytes. Both never decrease.
Places = tuple[Sequence[int], Sequence[int]]
# Ids, supervised spans, and places of the ids. Spans and places have the same unit.
Placed = tuple[list[int], Sequence[Span], Places]


def places(offsets: Sequence[Span]) -> Places:
    """Return offsets as places, without trailing tokens of no characters, such as EOS."""
    count = len(offsets)
    while count and offsets[count - 1][1] == 0:
        count -= 1
    if not count:
        return (), ()
    starts, ends = (tuple(accumulate(side, max)) for side in zip(*offsets[:count], strict=True))
    return starts, ends


class Anchor(NamedTuple):
    """Text before a piece that continues another one, and the ids of the anchor, to be removed."""

    text: str
    ids: list[int]


CONTINUATIONS = ("a", " a", "\na", "\n\na", "  a")


def anchor_of(tokenizer: Any, control: str, **how: Any) -> Anchor | None:
    """Return an anchor after which every text has the tokens of its own characters.

    SentencePiece adds a space before a text, and a newline may merge with the next one. control: a
    token that merges with nothing. None: there is no such anchor, so texts are not cut.
    """
    encode = partial(tokenizer, add_special_tokens=False, verbose=False, **how)
    bytes_of = _BytesOf(tokenizer)
    for text in ("", control, "\n"):
        ids = encode(text)["input_ids"] if text else []
        for sample in CONTINUATIONS:
            found = encode(text + sample)["input_ids"]
            rest = b"".join(bytes_of[one] for one in found[len(ids) :])
            if found[: len(ids)] != ids or rest != sample.encode():
                break
        else:
            return Anchor(text, ids)
    return None


def pieces_of(item: Rendered, anchor: Anchor | None) -> list[str]:
    """Return the pieces of the text between its cuts, all but the first after the anchor."""
    if not item.cuts or anchor is None:
        return [item.text]
    bounds = pairwise((0, *item.cuts, len(item.text)))
    first, *others = (item.text[begin:end] for begin, end in bounds)
    return [first, *(anchor.text + piece for piece in others)]


class Tiles:
    """Locates tokens by their bytes.

    usable: false for a tokenizer without the fast call, and once most texts of a call fail.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.backend = tokenizer.backend_tokenizer
        self.usable = hasattr(self.backend, "encode_batch_fast")
        self.bytes_of = _BytesOf(tokenizer)
        inner = tokenizer("a", add_special_tokens=False)["input_ids"]
        outer = tokenizer("a", add_special_tokens=True)["input_ids"]
        starts = range(len(outer) - len(inner) + 1)
        before = next((n for n in starts if outer[n : n + len(inner)] == inner), None)
        # Numbers of ids that the tokenizer adds before and after a text.
        self.before, self.after = before or 0, len(outer) - len(inner) - (before or 0)
        self.usable &= before is not None
        self.anchor = anchor_of(tokenizer, str(tokenizer.eos_token))

    def encode(self, items: Sequence[Rendered], split_special_tokens: bool) -> list[Placed | None]:
        """Return ids, spans and places in bytes for each text; None if the bytes differ from it."""
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = split_special_tokens
        own = items[0].add_special_tokens
        texts = [piece for item in items for piece in pieces_of(item, self.anchor)]
        encoded = iter(self.backend.encode_batch_fast(texts, add_special_tokens=own))
        skip, found = len(self.anchor.ids) if self.anchor else 0, list[Placed | None]()
        for item in items:
            ids = next(encoded).ids
            for _ in item.cuts if self.anchor else ():
                ids += next(encoded).ids[skip:]
            found.append(self._placed(item, ids))
        self.usable = 2 * found.count(None) <= len(found)
        return found

    def _placed(self, item: Rendered, ids: list[int]) -> Placed | None:
        before, after = (self.before, self.after) if item.add_special_tokens else (0, 0)
        tiles = [self.bytes_of[one] for one in ids[before : len(ids) - after]]
        joined, text = b"".join(tiles), item.text.encode("utf-8", "surrogatepass")
        lead = len(joined) - len(text)  # 1 if SentencePiece has added a space before the text
        if joined != (b" " + text if lead == 1 else text):
            return None
        ends = [*accumulate(map(len, tiles), initial=-lead)]
        added = [0] * before
        return ids, _in_bytes(item, len(text)), (added + ends[:-1], added + ends[1:])


class _BytesOf(dict[int, bytes]):
    """A map of token id to bytes, filled on first access."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.backend = tokenizer.backend_tokenizer
        self.added = {n: one.content for n, one in tokenizer.added_tokens_decoder.items()}
        self.bytewise = "ByteLevel" in repr(self.backend.decoder)

    def __missing__(self, number: int) -> bytes:
        self[number] = found = self._found(number)
        return found

    def _found(self, number: int) -> bytes:
        if number in self.added:
            return str(self.added[number]).encode()
        token = self.backend.id_to_token(number)
        if self.bytewise:
            return bytes(LETTERS.get(letter, 0) for letter in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return str(token).replace("\u2581", " ").encode("utf-8", "surrogatepass")


def _letters() -> dict[str, int]:
    """Return GPT-2's map of letters to bytes; the letter of a printable byte is that character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): b for n, b in enumerate(others)}


LETTERS = _letters()


def _in_bytes(item: Rendered, size: int) -> Sequence[Span]:
    """Return the item's spans in bytes; size: of the text, in bytes."""
    if size == len(item.text):  # one byte per character
        return item.spans
    text, at, done, spans = item.text, 0, 0, []
    for start, end in item.spans:
        first = at + len(text[done:start].encode("utf-8", "surrogatepass"))
        at = first + len(text[start:end].encode("utf-8", "surrogatepass"))
        done = end
        spans.append((first, at))
    return spans
