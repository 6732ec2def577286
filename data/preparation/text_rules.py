"""Removes invisible characters and leftovers of web pages; masks personal data."""

import re
from functools import partial

from data.preparation.html import split_fences

# Control characters, soft hyphen, zero-width and direction characters, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u180e\u2007\u200b-\u200d\u2028-\u202f\u2060-\u2069"
    "\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
CONTROLS = bytes({*range(32), 127} - {9, 10})
SPACES = {"\xa0", "\u2007", "\u202f"}
BREAKS = {"\u2028", "\u2029", "\x85"}
# Thai, Lao, Burmese and Khmer separate words with the zero-width space.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
PAGER = re.compile(r"\A\s*\d{1,3} / \d{1,3}(?:[ \t]*\n\s*(?!\d+ / \d)(?=\S)|(?=[A-Z][a-z]))")
COUNTER = re.compile(r"Copy\d+ chars / \d+ words|(?m:(?<!\d)\d{1,9} chars [/|] \d+ words[ \t]*$)")
TAIL_CHARACTERS = 64
SHARE_BUTTON = re.compile(r"(?:(?<=\S)|\n\s*)Share Prompt\s*\Z")
COPY_LINE = re.compile(r"^[ \t]*[\w+#.-]{0,20}Copy code[ \t]*(?:\n|\Z)", re.MULTILINE)
# The language and "Copy code" are between the fence and the code, in any order.
COPY_IN_FENCE = re.compile(
    r"\A([ \t]*[`~]{3,})[ \t]*([\w+#.-]{0,20}?)[ \t]*\n?[ \t]*"
    r"(?:([\w+#.-]{1,20}?)(?:Copy code)+|(?:Copy code)+[ \t]*(?=\n))[ \t]*\n?"
)
EMPTY_FENCE = re.compile(r"\A[ \t]*(?:`{3,}|~{3,})[^\n]*\n\s*(?:`{3,}|~{3,})\s*\Z")
# Patterns that begin with fixed text, which re finds fast.
MAYBE_EMPTY = (re.compile(r"```[^\n]*\n\s*```"), re.compile(r"~~~[^\n]*\n\s*~~~"))
LINES = re.compile(r"\n(?:[ \t]*\n){2,}")


def without_unseen(text: str) -> str:
    """Remove invisible characters, but not those that a script or an emoji needs."""
    # For ASCII, bytes.translate takes a tenth of the time of re.
    if text.isascii() and len(text.encode().translate(None, CONTROLS)) == len(text):
        return text
    if UNSEEN.search(text) is None:
        return text
    return UNSEEN.sub(_seen, text.replace("\r\n", "\n").replace("\r", "\n"))


def _seen(found: re.Match[str]) -> str:
    character, at = found[0], found.start()
    if character in SPACES:
        return " "
    if character in BREAKS:
        return "\n"
    before, after = found.string[max(0, at - 1) : at], found.string[at + 1 : at + 2]
    if character == "\u200b" and UNSPACED.match(before) and UNSPACED.match(after):
        return character
    joins = character in "\u200c\u200d" and _joined(before) and _joined(after)
    return character if joins else ""


def _joined(character: str) -> bool:
    """Return whether a joiner next to this character may be needed: emoji, Arabic, Indic."""
    return character >= "\u0590" and UNSEEN.match(character) is None


def without_residue(text: str) -> str:
    """Remove "1 / 2" before a message, "Copy12 chars / 2 words", "Copy code", "Share Prompt"."""
    if "Copy code" in text or " chars " in text:
        pieces = split_fences(text)
        pieces[::2] = [COPY_LINE.sub("", COUNTER.sub("", piece)) for piece in pieces[::2]]
        pieces[1::2] = [_without_copy(piece) for piece in pieces[1::2]]
        text = "".join(pieces)
    if " / " in text[:16]:
        text = PAGER.sub("", text)
    tail = text[-TAIL_CHARACTERS:]
    return text[:-TAIL_CHARACTERS] + SHARE_BUTTON.sub("", tail) if "Share Prompt" in tail else text


def _without_copy(fence: str) -> str:
    found = COPY_IN_FENCE.match(fence)
    if found is None:
        return fence
    ticks, info, label = found.groups()
    return f"{ticks}{info or label or ''}\n{fence[found.end() :]}"


def without_empty_fences(text: str) -> str:
    """Remove empty code fences."""
    if not any(pattern.search(text) for pattern in MAYBE_EMPTY):
        return text
    pieces = split_fences(text)
    for number in range(1, len(pieces), 2):
        if EMPTY_FENCE.match(pieces[number]):
            pieces[number] = ""
    return "".join(pieces)


def without_blank_runs(text: str) -> str:
    """Reduce three or more line breaks outside of code fences to two; strip the message."""
    if "\n\n" in text and LINES.search(text):
        pieces = split_fences(text)
        pieces[::2] = [LINES.sub("\n\n", piece) for piece in pieces[::2]]
        text = "".join(pieces)
    return text.strip()


EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
KEY = re.compile(
    r"\b(?:sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}\b|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{22,}|glpat-[\w-]{20,}|hf_[A-Za-z0-9]{30,}|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|AIza[\w-]{35}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]{0,8000}?-----END [A-Z ]*PRIVATE KEY-----"
)
CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}(?:[ -]?\d{2,6}){2,4}(?![\w-]|\.\d)")
# International numbers; (555) 123-4567 and 555-123-4567; national numbers with a leading zero.
PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}"
    r"|(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}"
    r"|0[1-9]\d{1,4}[ /-]\d{3,8}(?:[ -]\d{2,6}){0,3})(?![\w-]|\.\d)"
)


def masked(text: str) -> tuple[str, set[str]]:
    """Replace personal data by [EMAIL], [KEY], [CARD] and [PHONE]; return text and kinds."""
    found: set[str] = set()

    def mask(kind: str, match: re.Match[str]) -> str:
        if not _plausible(kind, match[0]):
            return match[0]
        found.add(kind)
        return f"[{kind}]"

    if "@" in text:
        text = EMAIL.sub(partial(mask, "EMAIL"), text)
    for kind, pattern in (("KEY", KEY), ("CARD", CARD), ("PHONE", PHONE)):
        text = pattern.sub(partial(mask, kind), text)
    return text, found


def _plausible(kind: str, text: str) -> bool:
    digits = [int(character) for character in text if character.isdecimal()]
    if kind == "PHONE":
        return 8 <= len(digits) <= 15
    return kind != "CARD" or (13 <= len(digits) <= 19 and _luhn(digits))


def _luhn(digits: list[int]) -> bool:
    """Return whether the check digit is valid (ISO/IEC 7812-1, annex B)."""
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0
