"""Reads the records of a JSON file: an array, one value per line, or one object with records."""

import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from typing import IO, Any

from data.errors import BadRecord, UserError
from data.files.json_loose import LARGEST, decode
from data.files.json_stream import (
    Window,
    array_values,
    broken_off,
    elements,
    invalid,
    is_turn,
    line_values,
    next_mark,
    parse_or_skip,
    parse_value,
)
from data.files.splits import listed, split_names, split_of, unknown_split

# Keys of an object under which a file has its records, besides the names of splits.
WRAPPERS = {
    *("data", "dataset", "records", "rows", "examples", "samples", "items", "entries"),
    *("conversations", "dialogues", "dialogs", "chats", "instances", "content", "results"),
}
# An object with one of these is a record itself.
RECORD_KEYS = {
    *("conversation", "messages", "instruction", "prompt", "question", "input", "text"),
    *("chosen", "mapping", "query"),
}
KEY = re.compile(r'[ \t\r\n,]*("(?:[^"\\]|\\.)*+")[ \t\r\n]*:[ \t\r\n]*', re.DOTALL)
SPACES = re.compile(r"[ \t\r\n]*")


def json_records(
    stream: IO[bytes], name: str, notes: Counter[str], part: str | None = None
) -> Iterator[Any]:
    """Yield each parsed value or BadRecord.

    part: the split to read of an object with several; None: the training split. Raises UserError
    for an empty file, a file in UTF-16 or UTF-32, and an unknown part.
    """
    window = Window(stream, name, notes)
    first = next_mark(window)
    if not first and not window.damage:
        raise UserError(f"{name}: the file is empty; expected ShareGPT dialogues, JSON or JSONL.")
    whole = first == "{" and not _has_second_line(window)
    if whole and _holds_records(window):
        yield from _wrapped(window, name, part)
        return
    if part:
        raise UserError(f"{name}@{part}: the file has no splits. Give {name}.")
    if first == "[":
        yield from array_values(window)
    elif not whole:
        yield from line_values(window)
    else:
        for value in line_values(window):
            yield from _rows_of_columns(value, notes)


def _has_second_line(window: Window) -> bool:
    """Return whether the first line is a whole value, and another line follows."""
    end = window.text.find("\n", window.at)
    if end < 0 or not window.text[end:].strip():
        return False
    try:
        _, after = decode(window.text, window.at)
    except (ValueError, RecursionError):
        return False
    return after <= end


def _holds_records(window: Window) -> bool:
    """Return whether the object that begins here has records under one of its keys."""
    while True:
        try:
            return _find_array(window.text, window.at + 1)
        except IndexError:  # the value is longer than what has been read
            if len(window.text) - window.at > LARGEST or not window.more():
                return False


def _find_array(text: str, at: int) -> bool:
    """Return whether a key of the object holds records; raises IndexError if the text is short."""
    while match := KEY.match(text, at):
        key, at = str(json.loads(match[1], strict=False)), match.end()
        if key in RECORD_KEYS:
            return False
        if text[at] == "[" and _has_records(key, text, at):
            return True
        at = _value_end(text, at)
    if not text[SPACES.match(text, at).end() :].startswith("}"):  # type: ignore[union-attr]
        raise IndexError
    return False


def _value_end(text: str, at: int) -> int:
    try:
        return decode(text, at)[1]
    except (ValueError, RecursionError) as error:
        raise IndexError from error


def _has_records(key: str, text: str, at: int) -> bool:
    """Return whether the array that begins here has records, by its key and first element."""
    first = SPACES.match(text, at + 1).end()  # type: ignore[union-attr]
    named = key.lower() in WRAPPERS or split_of(key) is not None
    if text[first] in "]":
        return named
    if text[first] not in "{[":
        return False
    if text[first] == "[":
        return named
    try:
        element, _ = decode(text, first)
    except (ValueError, RecursionError) as error:
        raise IndexError from error
    if is_turn(element) or {"from", "role", "speaker"} & element.keys():
        return False
    if key.lower() == "conversations":
        return bool({"conversations", "messages", "id"} & element.keys())
    return named or bool({"conversations", "messages", "instruction"} & element.keys())


def _wrapped(window: Window, name: str, part: str | None) -> Iterator[Any]:
    """Yield the records under the keys of the object that begins here, of one split."""
    window.at += 1
    taken: list[str] = []
    left: list[str] = []
    other: list[str] = []
    columns: Any = None
    while next_mark(window) == '"':
        key, end = parse_value(window)
        if end is None:
            yield key
            return
        window.at = end
        if next_mark(window) != ":":
            yield invalid(window, "expected : after a key; the rest of the file was not read", 0)
            return
        window.at += 1
        if next_mark(window) == "[" and _array_has_records(window, key):
            window.at += 1
            if not _is_wanted(key, part):
                left.append(key)
                deque(elements(window), maxlen=0)
            else:
                taken.append(key)
                window.notes[f'files with records under "{key}"'] += 1
                for value in elements(window):
                    yield _row(value, columns)
            window.at += 1
        else:
            value, end = parse_or_skip(window)
            if end is None:
                yield value if isinstance(value, BadRecord) else broken_off(window)
                return
            columns = value if key == "columns" else columns
            other.append(key)
            window.at = end
        if next_mark(window) == ",":
            window.at += 1
    if next_mark(window) != "}":
        yield invalid(window, f"expected , or }} after a value{window.damage}", 0)
    _account(window.notes, name, part, taken, left, other)


def _account(
    notes: Counter[str],
    name: str,
    part: str | None,
    taken: list[str],
    left: list[str],
    other: list[str],
) -> None:
    if not taken and (part or left):
        wanted = part or "train"
        raise UserError(unknown_split(name, wanted, left))
    if left:
        selects = f"which {name}@{split_of(left[0]) or left[0]} selects"
        notes[f"files without their {listed(left)}, {selects}"] += 1
    if other:
        notes[f"files with keys beside the records, not read ({listed(other)})"] += 1


def _array_has_records(window: Window, key: Any) -> bool:
    while True:
        try:
            return _has_records(str(key), window.text, window.at)
        except IndexError:
            if len(window.text) - window.at > LARGEST or not window.more():
                return False


def _is_wanted(key: str, part: str | None) -> bool:
    if part is not None:
        return part in split_names(key)
    return split_of(key) in (None, "train")


def _row(value: Any, columns: Any) -> Any:
    """Return an element as a record: rows of the hub's viewer, and of pandas' orient="split"."""
    if isinstance(value, dict) and {"row_idx", "row"} <= value.keys():
        return value["row"]
    if isinstance(value, list) and isinstance(columns, list) and len(columns) == len(value):
        return dict(zip(map(str, columns), value, strict=True))
    return value


def _rows_of_columns(value: Any, notes: Counter[str]) -> Iterator[Any]:
    """Yield the rows of an object with a whole table, as pandas and `datasets` write by column."""
    columns = [*value.values()] if isinstance(value, dict) else []
    rows: list[Any] = []
    if len(columns) > 1 and all(isinstance(one, dict) and one for one in columns):
        same = all(one.keys() == columns[0].keys() for one in columns)
        if same and all(str(key).isdecimal() for key in columns[0]):
            rows = [[one[key] for one in columns] for key in columns[0]]
    elif len(columns) > 1 and all(isinstance(one, list) and one for one in columns):
        same = {len(one) for one in columns} == {len(columns[0])}
        if same and not any(is_turn(element) for one in columns for element in one):
            rows = [*zip(*columns, strict=True)]
    if not rows:
        yield value
        return
    notes["files that hold their table by column"] += 1
    for row in rows:
        yield dict(zip(value, row, strict=True))
