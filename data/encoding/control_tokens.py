"""Encodes rendered dialogues so that only the template's control tokens become control tokens.

"</s>" in a message stays text. As a control token, it would let a user end or begin an answer.
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from data.encoding.templates import Rendered, control_tokens, unused_characters
from data.encoding.token_offsets import Placed, Tiles, places


class Encoder:
    """Encodes with a tokenizer, or with a changed copy if a message contains a control token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pattern = control_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self.control = {token.content: token for token in added if token.special}
        self.control_ids = {tokenizer.convert_tokens_to_ids(name) for name in self.control}
        self.control_ids |= {*tokenizer.all_special_ids}
        self.copies: dict[str, tuple[Any, dict[int, int]]] = {}
        self.tiles: Tiles | None = None
        self.verified = False  # whether the ids of `tiles` were found equal to the tokenizer's

    def __call__(self, rendered: Sequence[Rendered]) -> list[Placed]:
        """Return ids, supervised spans, and the place of each id, in characters or in bytes."""
        quoting = [self._has_control_text(item) for item in rendered]
        plain = [item for item, quotes in zip(rendered, quoting, strict=True) if not quotes]
        encoded = self._without_offsets(plain) if plain else iter(())
        both = zip(rendered, quoting, strict=True)
        return [self._with_copy(item) if quotes else next(encoded) for item, quotes in both]

    def _has_control_text(self, item: Rendered) -> bool:
        """Return whether a message contains the text of a control token."""
        return any(_inside(match, item) for match in self.pattern.finditer(item.text))

    def _without_offsets(self, items: Sequence[Rendered]) -> Iterator[Placed]:
        """Locate tokens by their bytes; if these differ from the text, encode it with offsets.

        If `tiles` is not usable with this tokenizer, encode all texts with offsets.
        """
        tiles = self.tiles = self.tiles or Tiles(self.tokenizer)
        if not tiles.usable:
            return self._encoded(self.tokenizer, items)
        tiled = tiles.encode(items, self.tokenizer.split_special_tokens)
        if not self._verify(items, tiled):
            tiles.usable = False
            return self._encoded(self.tokenizer, items)
        untiled = [item for item, placed in zip(items, tiled, strict=True) if placed is None]
        encoded = self._encoded(self.tokenizer, untiled)
        return (placed or next(encoded) for placed in tiled)

    def _verify(self, items: Sequence[Rendered], tiled: Sequence[Placed | None]) -> bool:
        """Return whether the ids equal the tokenizer's; only the first located text is compared.

        The ids come from the tokenizer's backend. The tokenizer itself may do more than that.
        """
        for item, placed in zip(items, tiled, strict=True):
            if placed and not self.verified:
                own_ids, _, _ = next(self._encoded(self.tokenizer, [item]))
                self.verified = own_ids == placed[0]
                return self.verified
        return True

    def _encoded(self, tokenizer: Any, items: Sequence[Rendered], **how: Any) -> Iterator[Placed]:
        encoded = tokenizer(
            [item.text for item in items],
            add_special_tokens=items[0].add_special_tokens,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
            **how,
        )
        columns = zip(items, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for item, ids, offsets in columns:
            yield ids, item.spans, places(offsets)

    def _with_copy(self, item: Rendered) -> Placed:
        """Encode a dialogue whose messages contain control tokens, which stay text.

        A tokenizer parses special tokens everywhere or nowhere. Here it parses none. The control
        tokens of the template are replaced by unused characters (marks). A copy of the tokenizer
        has the marks as tokens.
        """
        own = [match for match in self.pattern.finditer(item.text) if not _inside(match, item)]
        unused = unused_characters(item.text, len(self.control))
        marks = dict(zip(self.control, unused, strict=True))
        copied, originals = self._copy(marks)
        text, shifts, end = "", [(0, 0)], 0
        for match in own:
            text += item.text[end : match.start()] + marks[match.group()]
            end = match.end()
            shifts.append((end, end - len(text)))
        text += item.text[end:]
        spans = tuple((_shifted(a, shifts), _shifted(b, shifts)) for a, b in item.spans)
        marked = Rendered(text, spans, item.add_special_tokens)
        (ids, _, placed) = next(self._encoded(copied, [marked], split_special_tokens=True))
        return [originals.get(one, one) for one in ids], spans, placed

    def _copy(self, marks: dict[str, str]) -> tuple[Any, dict[int, int]]:
        """Return a copy of the tokenizer with the marks as tokens, and a map of ids.

        The map has the id of each mark, and the id of the control token that it replaces.
        """
        from tokenizers import AddedToken

        key = repr(marks)
        if key not in self.copies:
            copied = copy.deepcopy(self.tokenizer)
            for name, mark in marks.items():
                was = self.control[name]
                how = {"lstrip": was.lstrip, "rstrip": was.rstrip, "normalized": was.normalized}
                copied.add_tokens([AddedToken(mark, special=False, **how)])
            to_id = self.tokenizer.convert_tokens_to_ids
            ids = {copied.convert_tokens_to_ids(m): to_id(name) for name, m in marks.items()}
            self.copies = {key: (copied, ids)}  # nearly all dialogues use the same marks
        return self.copies[key]


def _inside(match: re.Match[str], item: Rendered) -> bool:
    """Return whether at least a part of the match belongs to a message."""
    first = bisect_right(item.messages, match.start(), key=lambda span: span[1])
    return first < len(item.messages) and item.messages[first][0] < match.end()


def _shifted(place: int, shifts: Sequence[tuple[int, int]]) -> int:
    """Return the place in the text with marks; shifts: (place, removed characters before it)."""
    return place - shifts[bisect_right(shifts, place, key=lambda shift: shift[0]) - 1][1]
