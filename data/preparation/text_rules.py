"""Removes from a message what the page around it has left there, and characters nobody sees."""

import re

from data.preparation.html import split_fences

# Control characters, soft hyphen, zero-width and direction characters, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u180e\u2007\u200b-\u200d\u2028-\u202f\u2060-\u2069"
    "\ud800-\udfff\ufeff\ufff9-\ufffb]"
)
CONTROLS = bytes({*range(32), 127} - {9, 10})
SPACES = {"\xa0", "\u2007", "\u202f"}
BREAKS = {"\u2028", "\u2029", "\x85"}
# Thai, Lao, Burmese and Khmer part words by the zero-width space.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
PAGER = re.compile(r"\A\s*\d{1,3} / \d{1,3}(?:[ \t]*\n\s*(?!\d+ / \d)(?=\S)|(?=[A-Z][a-z]))")
COUNTER = re.compile(r"Copy\d+ chars / \d+ words|(?m:(?<!\d)\d{1,9} chars [/|] \d+ words[ \t]*$)")
END = 64  # characters
SHARE = re.compile(r"(?:(?<=\S)|\n\s*)Share Prompt\s*\Z")
COPY_LINE = re.compile(r"^[ \t]*[\w+#.-]{0,20}Copy code[ \t]*(?:\n|\Z)", re.MULTILINE)
# "python" and "Copy code" stand in any arrangement between the fence and the code.
COPY_IN_FENCE = re.compile(
    r"\A([ \t]*[`~]{3,})[ \t]*([\w+#.-]{0,20}?)[ \t]*\n?[ \t]*"
    r"(?:([\w+#.-]{1,20}?)(?:Copy code)+|(?:Copy code)+[ \t]*(?=\n))[ \t]*\n?"
)
EMPTY_FENCE = re.compile(r"\A[ \t]*(?:`{3,}|~{3,})[^\n]*\n\s*(?:`{3,}|~{3,})\s*\Z")
# These two begin with fixed text, which re looks for fast.
MAYBE_EMPTY = (re.compile(r"```[^\n]*\n\s*```"), re.compile(r"~~~[^\n]*\n\s*~~~"))
LINES = re.compile(r"\n(?:[ \t]*\n){2,}")


def without_unseen(text: str) -> str:
    """Remove invisible characters, but not those that a script or an emoji is made with."""
    # Of ASCII, bytes.translate looks at a character in a tenth of the time that re needs.
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
    """Say whether a zero-width joiner may stand beside it: emoji, Arabic, the scripts of India."""
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
    tail = text[-END:]
    return text[:-END] + SHARE.sub("", tail) if "Share Prompt" in tail else text


def _without_copy(fence: str) -> str:
    found = COPY_IN_FENCE.match(fence)
    if found is None:
        return fence
    ticks, info, label = found.groups()
    return f"{ticks}{info or label or ''}\n{fence[found.end() :]}"


def without_empty_fences(text: str) -> str:
    """Remove code fences with nothing in them."""
    if not any(pattern.search(text) for pattern in MAYBE_EMPTY):
        return text
    pieces = split_fences(text)
    for number in range(1, len(pieces), 2):
        if EMPTY_FENCE.match(pieces[number]):
            pieces[number] = ""
    return "".join(pieces)


def without_blank_runs(text: str) -> str:
    """Make two of three line breaks and more, outside of code; strip the message."""
    if "\n\n" in text and LINES.search(text):
        pieces = split_fences(text)
        pieces[::2] = [LINES.sub("\n\n", piece) for piece in pieces[::2]]
        text = "".join(pieces)
    return text.strip()
