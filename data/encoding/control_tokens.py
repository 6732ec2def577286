"""The control tokens of a tokenizer, and characters that stand in for them."""

import re
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from data.errors import BadRecord


def unused_characters(text: str, count: int) -> list[str]:
    """Return `count` private-use characters that are not in the text; raises BadRecord."""
    private = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    found = [*islice((char for char in map(chr, private) if char not in text), count)]
    if len(found) < count:
        raise BadRecord(
            "refused by the template",
            f"the dialogue of {len(text):,} characters has nearly every private-use character; "
            f"expected {count} that it does not have",
        )
    return found


@lru_cache(maxsize=8)  # called for each dialogue
def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the tokenizer's control tokens, the longest first."""
    added = tokenizer.added_tokens_decoder.values()
    names = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")
