"""Encodes rendered dialogues so that only the template's control tokens become control tokens.

Text such as "</s>" in a message stays text. As a control token it would let a user end or begin an
answer.
"""

import copy
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from data.encoding.control_tokens import control_tokens, unused_characters
from data.encoding.templates import Rendered, TemplateName
from data.encoding.token_offsets import Anchor, Placed, Tiles, anchor_of, pieces_of, places
from data.errors import BadRecord, UserError


@lru_cache(maxsize=4)
def encoder_of(tokenizer: Any) -> "Encoder":
    """Return the encoder of a tokenizer."""
    return Encoder(tokenizer)


def prompt_ids(prompt: Rendered, template: TemplateName, tokenizer: Any) -> list[int]:
    """Return the ids that an answer is generated from, as they are in training."""
    if template == "t5":
        ids: list[int] = tokenizer(prompt.text, split_special_tokens=True)["input_ids"]
        return ids
    return encoder_of(tokenizer)([prompt])[0][0]


class Encoder:
    """Encodes with a tokenizer, and with a copy of it if messages contain control tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.pattern = control_tokens(tokenizer)
        added = tokenizer.added_tokens_decoder.values()
        self.control = {token.content: token for token in added if token.special}
        self.control_ids = {tokenizer.convert_tokens_to_ids(name) for name in self.control}
        self.control_ids |= {*tokenizer.all_special_ids}
        self.names: dict[int, str] = {}
        self.anchors: dict[str, Anchor | None] = {}
        self.copies: dict[str, tuple[Any, dict[int, int]]] = {}
        self.tiles: Tiles | None = None
        self.proved = False

    def __call__(self, rendered: Sequence[Rendered]) -> list[Placed]:
        """Return ids, supervised spans, and the place of each id, in characters or in bytes."""
        quoting = [self._quotes(item) for item in rendered]
        plain = [item for item, quotes in zip(rendered, quoting, strict=True) if not quotes]
        encoded = self._without_offsets(plain) if plain else iter(())
        both = zip(rendered, quoting, strict=True)
        return [self._literally(item) if quotes else next(encoded) for item, quotes in both]

    def name_of(self, token: int) -> str:
        """Return the text of a token."""
        if token not in self.names:
            self.names[token] = str(self.tokenizer.convert_ids_to_tokens(token))
        return self.names[token]

    def _quotes(self, item: Rendered) -> bool:
        return any(_inside(match, item) for match in self.pattern.finditer(item.text))

    def _without_offsets(self, items: Sequence[Rendered]) -> Iterator[Placed]:
        """Place tokens by their bytes if these make up the text, otherwise by offsets.

        Three cases, from fast to slow: a text that its tokens' bytes make up; a text that they do
        not, which is encoded once more; a tokenizer whose tokens cannot be used so at all.
        """
        tiles = self.tiles = self.tiles or Tiles(self.tokenizer)
        if not tiles.usable:
            return self._encoded(self.tokenizer, items)
        tiled = tiles.encode(items, self.tokenizer.split_special_tokens)
        if not self._is_proved(items, tiled):
            tiles.usable = False
            return self._encoded(self.tokenizer, items)
        untiled = [item for item, placed in zip(items, tiled, strict=True) if placed is None]
        encoded = self._encoded(self.tokenizer, untiled)
        return (placed or next(encoded) for placed in tiled)

    def _is_proved(self, items: Sequence[Rendered], tiled: Sequence[Placed | None]) -> bool:
        """Compare ids with the tokenizer's own once, for the first text that is placed by bytes.

        A tokenizer may do more than its backend, which returned these ids.
        """
        for item, placed in zip(items, tiled, strict=True):
            if placed and not self.proved:
                own_ids, _, _ = next(self._encoded(self.tokenizer, [item]))
                self.proved = own_ids == placed[0]
                return self.proved
        return True

    def _encoded(
        self, tokenizer: Any, items: Sequence[Rendered], control: str = "", **how: Any
    ) -> Iterator[Placed]:
        """Yield the placed tokens of each text; a text is tokenised apart at its cuts.

        control: a control token of this tokenizer; by default its EOS token.
        """
        control = control or str(tokenizer.eos_token)
        if control not in self.anchors:
            self.anchors[control] = anchor_of(tokenizer, control, **how)
        anchor = self.anchors[control]
        before, removed = anchor or ("", [])
        texts = [piece for item in items for piece in pieces_of(item, anchor)]
        encoded = tokenizer(
            texts,
            add_special_tokens=items[0].add_special_tokens if items else False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
            **how,
        )
        columns = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        for item in items:
            ids, offsets = next(columns)
            ids, offsets = [*ids], [*offsets]
            for cut in item.cuts if anchor else ():
                more_ids, more_offsets = next(columns)
                skip, moved = len(removed), cut - len(before)
                ids += more_ids[skip:]
                offsets += [(start + moved, end + moved) for start, end in more_offsets[skip:]]
            yield ids, item.spans, places(offsets)

    def _literally(self, item: Rendered) -> Placed:
        """Encode a dialogue whose messages contain control tokens; these stay text.

        A tokenizer parses special tokens everywhere or nowhere. Here it parses none. The template's
        own are replaced by unused characters, which a copy of the tokenizer has as tokens.
        """
        own = [match for match in self.pattern.finditer(item.text) if not _inside(match, item)]
        try:
            unused = unused_characters(item.text, len(self.control))
        except BadRecord as bad:
            raise UserError(f"{bad}. Remove the dialogue.") from None
        marks = dict(zip(self.control, unused, strict=True))
        copied, originals = self._copy(marks)
        text, shifts, end = "", [(0, 0)], 0
        for match in own:
            text += item.text[end : match.start()] + marks[match.group()]
            end = match.end()
            shifts.append((end, end - len(text)))
        text += item.text[end:]
        spans = tuple((_shifted(a, shifts), _shifted(b, shifts)) for a, b in item.spans)
        cuts = tuple(_shifted(cut, shifts) for cut in item.cuts)
        marked = Rendered(text, spans, item.add_special_tokens, cuts=cuts)
        (ids, _, placed) = next(
            self._encoded(copied, [marked], next(iter(marks.values())), split_special_tokens=True)
        )
        return [originals.get(one, one) for one in ids], spans, placed

    def _copy(self, marks: dict[str, str]) -> tuple[Any, dict[int, int]]:
        """Return a copy of the tokenizer with the marks as tokens, and the ids they stand for."""
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
    """Return whether at least a part of a control token's text belongs to a message."""
    first = bisect_right(item.messages, match.start(), key=lambda span: span[1])
    return first < len(item.messages) and item.messages[first][0] < match.end()


def _shifted(place: int, shifts: Sequence[tuple[int, int]]) -> int:
    """Return a place of the text after the control tokens before it are replaced by marks."""
    return place - shifts[bisect_right(shifts, place, key=lambda shift: shift[0]) - 1][1]
