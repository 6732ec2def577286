"""Parses JSON that has comments and trailing commas, after strict parsing has failed."""

import json
import re
from collections import Counter
from typing import Any

LARGEST = 8 << 20  # characters; a larger record is bad, which bounds memory
COMMENT = r"//[^\n\r]*|/\*.*?\*/|\#[^\n\r]*"
# A string, a comment or a bracket; an unclosed string extends to the end of the text.
TOKENS = re.compile(rf'"(?:[^"\\]|\\.)*+"?|{COMMENT}|[\[\]{{}}]', re.DOTALL)
WITHOUT_COMMENTS = re.compile(rf'("(?:[^"\\]|\\.)*+"?)|{COMMENT}', re.DOTALL)
TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*+"?)|,(?=[ \t\r\n]*[}\]])', re.DOTALL)
COMMENT_AT = re.compile(COMMENT, re.DOTALL)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of the pairs; raises ValueError for a duplicate key."""
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {json.dumps(duplicate)[:40]} in one object")
    return parsed


DECODER = json.JSONDecoder(object_pairs_hook=unique)


def decode(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at `start`, and its end; raises ValueError."""
    return DECODER.raw_decode(text, start)


def loose_end(text: str, start: int) -> int | None:
    """Return the end of the object or list that begins at `start`; None if the text is too short.

    Brackets in strings and comments do not count.
    """
    depth = 0
    for match in TOKENS.finditer(text, start):
        mark = match.group()
        if mark[0] in "[{":
            depth += 1
        elif mark[0] in "]}":
            depth -= 1
        if depth <= 0 and mark[0] in "[]{}":
            return match.end()
    return None


def decode_loose(text: str) -> Any:
    """Return the JSON value of a text with comments and trailing commas; raises ValueError."""
    bare = WITHOUT_COMMENTS.sub(lambda match: match[1] or " ", text)
    bare = TRAILING_COMMA.sub(lambda match: match[1] or "", bare).strip()
    value, end = decode(bare, 0)
    if end < len(bare):
        raise ValueError("extra data")
    return value
