"""Reads JSON values from a stream one at a time, and continues after invalid values."""

import codecs
import functools
import gzip
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from typing import IO, Any, cast

from data.errors import BadRecord, UserError
from data.files.json_loose import COMMENT_AT, LARGEST, decode, decode_loose, loose_end

CHUNK = 1 << 20
DEEPEST = 200  # levels; code that reads the values has a limit near 1,000
DEEP = f"the record has more than {DEEPEST} nested levels of objects and lists"
SPACE = re.compile(r"[ \t\r\n]*")
SCALAR_END = re.compile(r"[,\]]")
# A bracket, or a string; an unclosed string extends to the end of the text.
STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
# The decoder's escape of a byte that is not UTF-8 (PEP 383).
ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
# An error this close to the end may come from an incomplete value ("tru", "\\u00"). More is read.
CUT_CHARACTERS = 12
# Failed attempts to read on after a cut record; each may scan CHUNK characters.
MAX_FAILURES = 1000
MAX_LOOSE_FAILURES = 20
GUESSED_BYTES = 64 << 10
ENCODINGS = [
    *("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r"),
    *("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr"),
]
LOOSE = "records with comments or trailing commas"
COMMENTS = "comments between records"
TRAILING_COMMAS = "commas after a last record or line"
# After a value on its line: the next value, a comment, or a comma alone.
AFTER_VALUE = re.compile(r"[ \t\r,]*(?:[{\[/#]|$)")
LINE_BRACKET = re.compile(r"[\r\n][{\[]")
ONE_PER_LINE = "; a file that does not begin with [ has one record per line"


def check_utf8(head: bytes, name: str) -> None:
    """Raise UserError for a file that begins like UTF-16 or -32; it need not have a BOM."""
    bare = len(head) == 4 and (head[::2] == b"\0\0") != (head[1::2] == b"\0\0")
    marked = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if bare or marked:
        wide = "utf-32" if head in (b"\xff\xfe\0\0",) or head.count(b"\0") == 3 else "utf-16"
        order = "" if marked or not bare else "-le" if head[0] else "-be"
        raise UserError(
            f"{name}: found UTF-16 or UTF-32; expected UTF-8. Give --encoding {wide}{order}, or "
            "save the file as UTF-8."
        )


def not_utf8(text: str) -> str:
    """Return the explanation for a text with escaped bytes, with a guess of its encoding."""
    byte = ord(cast(re.Match[str], ESCAPED_BYTE.search(text)).group()) - 0xDC00
    raw = text.encode("utf-8", "surrogateescape")[:GUESSED_BYTES]
    guess = guess_encoding(raw)
    remedy = f"it may be {guess}: give --encoding {guess}" if guess else "give its --encoding NAME"
    return f"the byte 0x{byte:02x} is not UTF-8; {remedy}, or save the file as UTF-8"


@functools.lru_cache(16)
def guess_encoding(raw: bytes) -> str | None:
    """Return the likely encoding of a text that is not UTF-8; cp1252 where little is known."""
    from charset_normalizer import from_bytes

    found = from_bytes(raw, cp_isolation=ENCODINGS).best()
    try:
        raw.decode("cp1252")
    except UnicodeDecodeError:
        return found.encoding if found else None
    few = sum(byte > 127 for byte in raw) * 5 < len(raw)  # other scripts have more of them
    return "cp1252" if few or found is None else found.encoding


class Window:
    """A part of a text, read on demand.

    at: position of the parser; end: of the last value's end. line: line number at the start of
    `text`. damage: an error of the decompression. notes: what was accepted, for the account.
    failures: records that could not be completed by the lines after them.
    """

    def __init__(self, stream: IO[bytes], name: str, notes: Counter[str]) -> None:
        self.stream, self.text, self.at, self.line = stream, "", 0, 1
        self.end, self.notes, self.failures = 0, notes, 0
        self.ended = False
        self.damage = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        head = self._read(4)
        check_utf8(head, name)
        self.text = self.decoder.decode(head)
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self) -> bool:
        """Double the unparsed text, or read CHUNK bytes if these are more; False at the end."""
        if self.ended:
            return False
        self.line += self.text.count("\n", 0, self.at)
        raw = self._read(max(CHUNK, len(self.text) - self.at))
        self.ended = not raw
        self.text = self.text[self.at :] + self.decoder.decode(raw, final=self.ended)
        self.at = 0
        return not self.ended

    def _read(self, size: int) -> bytes:
        pieces: list[bytes] = []
        try:
            # It is read in pieces, so that nothing before the damage is lost.
            while size > 0 and not self.damage and (piece := cast(Any, self.stream).read1(size)):
                pieces.append(piece)
                size -= len(piece)
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
            self.damage = f"; its compression is damaged: {error}"
        return b"".join(pieces)

    def skip_space(self) -> str:
        """Move to the next character that is not white space, and return it."""
        while True:
            self.at = cast(re.Match[str], SPACE.match(self.text, self.at)).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def place(self, offset: int = 0) -> str:
        """Return line and column of a character, by its offset from `at`."""
        end = self.at + offset
        line = self.line + self.text.count("\n", 0, end)
        return f"line {line}, column {end - self.text.rfind(chr(10), 0, end)}"


def line_values(window: Window) -> Iterator[Any]:
    """Yield the values of a text with one value per line, or with any space between values."""
    while mark := next_mark(window):
        # Lines end with "\n" only. str.splitlines also splits at U+2028, which is valid in JSON.
        size = len(window.text) - window.at
        end = window.text.find("\n", window.at)
        while end < 0 and size <= LARGEST and window.more():
            end = window.text.find("\n", size)
            size = len(window.text)
        if end < 0 and size > LARGEST:
            value = _attempt(window) if mark in "[{" else None
            if mark in "[{" and not isinstance(value, BadRecord):
                yield from _values(window, value)
                return
            yield _too_large(window)
            if not _skip_line(window):
                return
            continue
        end = len(window.text) if end < 0 else end
        line = window.text[window.at : end]
        try:
            value, parsed = decode(line, 0)
            rest = cast(re.Match[str], SPACE.match(line, parsed)).end()
            if rest < len(line):
                if mark in "[{" and AFTER_VALUE.match(line, rest):
                    window.end = window.at + parsed
                    yield from _values(window, value)
                    return
                value = invalid(window, "extra data", rest)
        except (ValueError, RecursionError) as error:
            if mark in "[{" and window.failures < MAX_FAILURES:
                value = _attempt(window)
                if not isinstance(value, BadRecord):
                    yield from _values(window, value)
                    return
                window.failures += 1
            value = _line_error(window, line, error)
        yield checked(value, line, window)
        window.at += len(line)  # `end` is not valid after an attempt that has read on
    if window.damage:
        yield BadRecord("breaks off", f"{window.place()}: the file breaks off{window.damage}")


def _line_error(window: Window, line: str, error: Exception) -> BadRecord:
    if not isinstance(error, json.JSONDecodeError):
        return invalid(window, str(error), 0)
    hint = ONE_PER_LINE if error.pos >= len(line.rstrip()) else ""
    return invalid(window, error.msg + hint, error.pos)


def _values(window: Window, first: Any) -> Iterator[Any]:
    """Yield values with any space, comments or commas between them, as `jq` and editors write.

    first: the value that begins here and ends at `window.end`. After an invalid value, the next one
    begins on a line that begins with a bracket.
    """
    yield checked(first, window.text[window.at : window.end], window)
    window.at = window.end
    while mark := next_mark(window):
        if mark == ",":
            window.notes[TRAILING_COMMAS] += 1
            window.at += 1
            continue
        value = _attempt(window) if mark in "[{" else invalid(window, "expected { or [", 0)
        start = window.at
        if not isinstance(value, BadRecord):
            window.at = window.end
            yield checked(value, window.text[start : window.end], window)
            continue
        yield value
        if not _skip_to_bracket(window):
            break
    if window.damage:
        yield BadRecord("breaks off", f"{window.place()}: the file breaks off{window.damage}")


def _attempt(window: Window) -> Any:
    """Return the object or list that begins here, or BadRecord; `window.end` is its end."""
    value, end = parse_value(window)
    window.end = window.at if end is None else end
    return value


def _loose(window: Window, offset: int) -> tuple[Any, int] | None:
    """Return the value that begins here and its end, with comments and trailing commas in it.

    offset: where strict parsing has failed, from `window.at`. None if the value is invalid.
    """
    found = window.text[window.at + offset :][:100].lstrip(" \t\r\n,")[:1]
    if found not in tuple("/#}]"):
        return None
    # The text is limited, because many records of a file may be cut.
    if window.failures > MAX_LOOSE_FAILURES:
        return None
    while (end := loose_end(window.text, window.at)) is None:
        if len(window.text) - window.at > CHUNK or not window.more():
            window.failures += 1
            return None
    record = window.text[window.at : end]
    try:
        value = decode_loose(record)
    except (ValueError, RecursionError):
        return None
    window.notes[LOOSE] += 1
    return value, end


def next_mark(window: Window) -> str:
    """Move to the next character that is neither space nor in a comment, and return it."""
    while (mark := window.skip_space()) and mark in "/#":
        found = COMMENT_AT.match(window.text, window.at)
        while (found is None or found.end() == len(window.text)) and (
            len(window.text) - window.at <= LARGEST and window.more()
        ):
            found = COMMENT_AT.match(window.text, window.at)
        if found is None:
            return mark
        window.notes[COMMENTS] += 1
        window.at = found.end()
    return mark


def _skip_line(window: Window) -> bool:
    """Move behind the next line end; False at the end of the file."""
    end = window.text.find("\n", window.at)
    while end < 0:
        window.at = len(window.text)
        if not window.more():
            return False
        end = window.text.find("\n")
    window.at = end
    return True


def _skip_to_bracket(window: Window) -> bool:
    """Move to the next line that begins with a bracket; False if there is none."""
    while True:
        found = LINE_BRACKET.search(window.text, window.at)
        if found:
            window.at = found.end() - 1
            return True
        window.at = max(window.at, len(window.text) - 1)
        if not window.more():
            return False


def array_values(window: Window) -> Iterator[Any]:
    """Yield the elements of one or several arrays; an array of messages is one value."""
    if (value := _one_dialogue(window)) is not None:
        yield from _values(window, value)
        return
    while next_mark(window) == "[":  # concatenated files have several arrays
        window.at += 1
        if (yield from elements(window)) is None:
            return
        window.at += 1
    if window.text[window.at :].strip() or window.damage:
        if window.text[window.at] == "{":
            yield from line_values(window)
            return
        found = "text after the array's end; the rest of the file was not read"
        yield invalid(window, found + window.damage, 0)


def elements(window: Window) -> Generator[Any, None, bool | None]:
    """Yield the elements of the array that begins here; return True at its end, None if lost."""
    mark = next_mark(window)
    while mark != "]":
        value, end = parse_or_skip(window) if mark else (broken_off(window), None)
        if end is None:
            yield value
            return None
        yield checked(value, window.text[window.at : end], window)
        window.at = end
        mark = next_mark(window)
        if mark == ",":
            window.at += 1
            mark = next_mark(window)
            if mark == "]":
                window.notes[TRAILING_COMMAS] += 1
        elif mark not in ("", "]"):
            found = "expected , or ] after a record; the rest of the file was not read"
            yield invalid(window, found + window.damage, 0)
            return None
    return True


def _one_dialogue(window: Window) -> Any:
    """Return the array that begins here if it is one dialogue: a list of messages; else None."""
    while True:
        try:
            first = cast(re.Match[str], SPACE.match(window.text, window.at + 1)).end()
            turn, _ = decode(window.text, first)
            break
        except (ValueError, RecursionError):
            if len(window.text) - window.at > CHUNK or not window.more():
                return None
    if not is_turn(turn):
        return None
    value = _attempt(window)
    return None if isinstance(value, BadRecord) or not all(map(is_turn, value)) else value


def is_turn(value: Any) -> bool:
    """Return whether a value is a message of a dialogue, and no record."""
    if not isinstance(value, dict) or {"parent_id", "conversations", "messages"} & value.keys():
        return False
    return {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()


def broken_off(window: Window) -> BadRecord:
    """Return the BadRecord for a file that ends within a value."""
    where = window.place(len(window.text) - window.at)
    return BadRecord("breaks off", f"{where}: the file breaks off here{window.damage}")


def parse_or_skip(window: Window) -> tuple[Any, int | None]:
    """Return the record that begins here and its end, None if the end is unknown."""
    value, end = parse_value(window)
    if isinstance(value, BadRecord) and value.cause != "breaks off":
        end = _end_of_record(window)
    return value, end


def parse_value(window: Window) -> tuple[Any, int | None]:
    """Return the value that begins here and its end, or BadRecord and None."""
    while True:
        size = len(window.text) - window.at
        try:
            value, end = decode(window.text, window.at)
            begin = window.at
            if end < len(window.text) or window.ended:
                return value, end
            if not window.more():
                return value, end - begin
            continue  # The value may be a number whose last digits have not been read yet.
        except json.JSONDecodeError as error:
            offset = error.pos - window.at
            unterminated = error.msg.startswith("Unterminated")
            if unterminated or offset >= size - CUT_CHARACTERS:
                if size <= LARGEST and window.more():
                    continue
                if size > LARGEST:
                    return _too_large(window), None
            if unterminated or offset >= len(window.text[window.at :].rstrip()):
                return broken_off(window), None
            if (loose := _loose(window, offset)) is not None:
                return loose
            bad = invalid(window, error.msg, offset)
        # Thousands of digits, duplicate keys, or deep nesting.
        except (ValueError, RecursionError) as error:
            bad = invalid(window, str(error), 0)
        return bad, None


def _end_of_record(window: Window) -> int | None:
    """Return the end of a record that cannot be parsed, by its brackets; None if not found."""
    if window.text[window.at] not in '{["':
        found = SCALAR_END.search(window.text, window.at)
        return found.start() if found else None
    while True:
        depth = 0
        for match in STRUCTURE.finditer(window.text, window.at):
            mark = match.group()
            if mark[0] != '"':
                depth += 1 if mark in "[{" else -1
            if depth <= 0:
                # A negative depth is the end of the surrounding array, not of the record.
                return match.start() if depth < 0 else match.end()
        if len(window.text) - window.at > 2 * LARGEST or not window.more():
            return None


def checked(value: Any, text: str, window: Window) -> Any:
    """Return the value, or BadRecord if its text is not UTF-8 or too deeply nested."""
    found = None if text.isascii() else ESCAPED_BYTE.search(text)
    if found is None:
        deep = _deeper(value, text, DEEPEST)
        return BadRecord("nested too deep", f"{window.place()}: {DEEP}") if deep else value
    return BadRecord("not UTF-8", f"{window.place(found.start())}: {not_utf8(text)}")


def _deeper(value: Any, text: str, most: int) -> bool:
    """Return whether a value has more than `most` levels of objects and lists."""
    if text.count("[") + text.count("{") <= most:
        return False
    level = [value]
    for _ in range(most):
        level = [one for outer in level for one in _inside(outer)]
    return bool(level)


def _inside(value: Any) -> Iterable[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (one for one in inner if isinstance(one, dict | list))


def invalid(window: Window, message: str, offset: int) -> BadRecord:
    """Return the BadRecord for text that is not JSON, with its line and column."""
    return BadRecord("not valid JSON", f"{window.place(offset)}: not valid JSON: {message}")


def _too_large(window: Window) -> BadRecord:
    most = LARGEST >> 20
    return BadRecord("too large", f"{window.place()}: more than {most} million characters")
