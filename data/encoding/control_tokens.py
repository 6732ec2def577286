"""Encodes rendered dialogues so that control tokens come from the template alone.

Text like "</s>" in a message is a message's text: were it read as a control token, a user could
end an answer, or begin one.
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from data.encoding.templates import Rendered, control_tokens, unused_characters
from data.encoding.token_offsets import Placed, Tiles, places


class Encoder:
    """Encodes with one tokenizer, and with a copy of it where messages hold control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pattern = control_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self.control = {token.content: token for token in added if token.special}
        self.control_ids = {tokenizer.convert_tokens_to_ids(name) for name in self.control}
        self.control_ids |= {*tokenizer.all_special_ids}
        self.copies: dict[str, tuple[Any, dict[int, int]]] = {}
        self.tiles: Tiles | None = None
        self.proved = False

    def __call__(self, rendered: Sequence[Rendered]) -> list[Placed]:
        """Return ids, the supervised spans, and where each id stands: characters, or bytes.

        A template's own control tokens are found as ever.
        """
        quoting = [self._quotes(item) for item in rendered]
        plain = [item for item, quotes in zip(rendered, quoting, strict=True) if not quotes]
        encoded = self._quickly(plain) if plain else iter(())
        both = zip(rendered, quoting, strict=True)
        return [self._literally(item) if quotes else next(encoded) for item, quotes in both]

    def _quotes(self, item: Rendered) -> bool:
        return any(_inside(match, item) for match in self.pattern.finditer(item.text))

    def _quickly(self, items: Sequence[Rendered]) -> Iterator[Placed]:
        """Encode without offsets where the tokens' bytes tell their places, else with them."""
        self.tiles = self.tiles or Tiles(self.tokenizer)
        if not self.tiles.usable:
            yield from self._encoded(self.tokenizer, items)
            return
        tiled = self.tiles.encode(items, self.tokenizer.split_special_tokens)
        both = [*zip(items, tiled, strict=True)]
        shown = [(item, found[0]) for item, found in both if found][: not self.proved]
        for item, ids in shown:  # A tokenizer may do more than its backend: seen by a first text.
            self.proved = self.tiles.usable = next(self._encoded(self.tokenizer, [item]))[0] == ids
        if shown and not self.proved:
            yield from self._encoded(self.tokenizer, items)
            return
        others = [item for item, found in both if found is None]
        rest = self._encoded(self.tokenizer, others) if others else iter(())
        yield from (next(rest) if found is None else found for found in tiled)

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

    def _literally(self, item: Rendered) -> Placed:
        """Encode a dialogue whose messages hold control tokens, as the text that they are.

        A tokenizer reads special tokens everywhere or nowhere. So the template's own are put into
        the text as other characters, which a copy of the tokenizer knows in their place.
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
        """Return a tokenizer that also knows the marks, and the ids that they stand for."""
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
            self.copies = {key: (copied, ids)}  # the marks are nearly always the same
        return self.copies[key]


def _inside(match: re.Match[str], item: Rendered) -> bool:
    """Whether a control token's name is at least partly a message's text."""
    first = bisect_right(item.messages, match.start(), key=lambda span: span[1])
    return first < len(item.messages) and item.messages[first][0] < match.end()


def _shifted(place: int, shifts: Sequence[tuple[int, int]]) -> int:
    """Return where a place of the text is when the control tokens before it have been replaced."""
    return place - shifts[bisect_right(shifts, place, key=lambda shift: shift[0]) - 1][1]
