"""Reads JSON values from a stream one at a time, and continues after invalid values."""

import codecs
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from data.errors import BadRecord, UserError

LARGEST = 8 << 20  # characters; a larger record is bad, which bounds memory
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
ONE_PER_LINE = "; a file that does not begin with [ has one record per line"


def json_records(stream: BufferedIOBase, path: Path) -> Iterator[Any]:
    """Yield each parsed value or BadRecord; the file is an array, or has one value per line.

    Raises UserError for an empty file, and for a file in UTF-16 or UTF-32.
    """
    window = _Window(stream, path)
    first = window.skip_space()
    if not first and not window.damage:
        raise UserError(f"{path}: the file is empty; expected ShareGPT dialogues, JSON or JSONL.")
    yield from _array(window) if first == "[" else _lines(window)


def check_utf8(head: bytes, path: Path) -> None:
    """Raise UserError for a file that begins like UTF-16 or -32; it need not have a BOM."""
    bare = len(head) == 4 and (head[::2] == b"\0\0") != (head[1::2] == b"\0\0")
    if bare or head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise UserError(f"{path}: found UTF-16 or UTF-32; expected UTF-8. Save the file as UTF-8.")


class _Window:
    """A part of a text, read on demand.

    at: position of the parser. line: line number at the start of `text`. damage: an error of the
    decompression.
    """

    def __init__(self, stream: BufferedIOBase, path: Path) -> None:
        self.stream, self.text, self.at, self.line = stream, "", 0, 1
        self.ended = False
        self.damage = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        head = self._read(4)
        check_utf8(head, path)
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
            while size > 0 and not self.damage and (piece := self.stream.read1(size)):
                pieces.append(piece)
                size -= len(piece)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
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


def _lines(window: _Window) -> Iterator[Any]:
    while window.skip_space():
        # Lines end with "\n" only. str.splitlines also splits at U+2028, which is valid in JSON.
        size = len(window.text) - window.at
        end = window.text.find("\n", window.at)
        while end < 0 and size <= LARGEST and window.more():
            end = window.text.find("\n", size)
            size = len(window.text)
        if end < 0 and size > LARGEST:
            yield _too_large(window)
            while end < 0:
                window.at = len(window.text)
                if not window.more():
                    return
                end = window.text.find("\n")
            window.at = end
            continue
        end = len(window.text) if end < 0 else end
        line = window.text[window.at : end]
        try:
            value, parsed = _decode(line, 0)
            rest = cast(re.Match[str], SPACE.match(line, parsed)).end()
            if rest < len(line):
                value = _invalid(window, "extra data", rest)
        except json.JSONDecodeError as error:
            hint = ONE_PER_LINE if error.pos >= len(line.rstrip()) else ""
            value = _invalid(window, error.msg + hint, error.pos)
        except (ValueError, RecursionError) as error:
            value = _invalid(window, str(error), 0)
        yield _checked(value, line, window)
        window.at = end
    if window.damage:
        yield BadRecord("breaks off", f"{window.place()}: the file breaks off{window.damage}")


def _array(window: _Window) -> Iterator[Any]:
    while window.skip_space() == "[":  # concatenated files have several arrays
        window.at += 1
        mark = window.skip_space()
        while mark != "]":
            value, end = _record(window) if mark else (_broken_off(window), None)
            if end is None:
                yield value
                return
            yield _checked(value, window.text[window.at : end], window)
            window.at = end
            mark = window.skip_space()
            if mark == ",":
                window.at += 1
                mark = window.skip_space()
            elif mark not in ("", "]"):
                found = "expected , or ] after a record; the rest of the file was not read"
                yield _invalid(window, found + window.damage, 0)
                return
        window.at += 1
    if window.text[window.at :].strip() or window.damage:
        found = "text after the array's end; the rest of the file was not read"
        yield _invalid(window, found + window.damage, 0)


def _broken_off(window: _Window) -> BadRecord:
    where = window.place(len(window.text) - window.at)
    return BadRecord("breaks off", f"{where}: the file breaks off here{window.damage}")


def _record(window: _Window) -> tuple[Any, int | None]:
    """Return the record that begins here and its end, None if the end is unknown."""
    while True:
        size = len(window.text) - window.at
        try:
            value, end = _decode(window.text, window.at)
            if end < len(window.text) or window.ended or not window.more():
                return value, end
            continue  # The value may be a number whose last digits have not been read yet.
        except json.JSONDecodeError as error:
            offset = error.pos - window.at
            unterminated = error.msg.startswith("Unterminated")
            if unterminated or offset >= size - CUT_CHARACTERS:
                if size <= LARGEST and window.more():
                    continue
                if size > LARGEST:
                    return _too_large(window), _end_of_record(window)
            if unterminated or offset >= len(window.text[window.at :].rstrip()):
                return _broken_off(window), None
            bad = _invalid(window, error.msg, offset)
        # Thousands of digits, duplicate keys, or deep nesting.
        except (ValueError, RecursionError) as error:
            bad = _invalid(window, str(error), 0)
        return bad, _end_of_record(window)


def _end_of_record(window: _Window) -> int | None:
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


def _decode(text: str, start: int) -> tuple[Any, int]:
    return DECODER.raw_decode(text, start)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {json.dumps(duplicate)[:40]} in one object")
    return parsed


DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _checked(value: Any, text: str, window: _Window) -> Any:
    found = ESCAPED_BYTE.search(text)
    if found is None:
        deep = _deeper(value, text, DEEPEST)
        return BadRecord("nested too deep", f"{window.place()}: {DEEP}") if deep else value
    byte = f"0x{ord(found.group()) - 0xDC00:02x}"
    place = window.place(found.start())
    return BadRecord("not UTF-8", f"{place}: the byte {byte} is not UTF-8; save the file as UTF-8")


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


def _invalid(window: _Window, message: str, offset: int) -> BadRecord:
    return BadRecord("not valid JSON", f"{window.place(offset)}: not valid JSON: {message}")


def _too_large(window: _Window) -> BadRecord:
    most = LARGEST >> 20
    return BadRecord("too large", f"{window.place()}: more than {most} million characters")
