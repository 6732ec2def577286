"""Reads values of a record, and raises BadRecord for those of another type."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NoReturn

from data.errors import BadRecord

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def bad(cause: str, explanation: str) -> NoReturn:
    """Raise BadRecord."""
    raise BadRecord(cause, explanation)


def kind(value: Any) -> str:
    """Return the type of a JSON value in words; a Parquet value of another type keeps its name."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def text_at(holder: dict[str, Any], key: str, place: str = "") -> str:
    """Return the string that a key holds; raises BadRecord."""
    value = holder.get(key)
    if not isinstance(value, str):
        found = f'"{key}" is {kind(value)}' if key in holder else f'found no "{key}"'
        bad("value is not text", f"{place}{found}; expected a string")
    return value


def list_at(record: dict[str, Any], key: str) -> list[Any]:
    """Return the list of turns that a key holds, with one turn or more; raises BadRecord."""
    turns = record.get(key)
    if not isinstance(turns, list):
        found = f'"{key}" is {kind(turns)}' if key in record else f'found no "{key}"'
        bad(f"no {key}", f"{found}; expected a list of turns")
    if not turns:
        bad("no turns", f'"{key}" is empty; expected a human turn and a gpt turn')
    return turns


def json_of(text: str, what: str) -> Any:
    """Return the value of JSON text; raises BadRecord."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        bad("invalid JSON text", f"{what} is not valid JSON: {error}; expected JSON")


def agreed(found: dict[str, Any], place: str = "", same: Callable[[Any], Any] = lambda x: x) -> Any:
    """Return the value of the first key, None without keys; raises BadRecord if values differ.

    same: what is compared of a value.
    """
    for (one, value), (other, another) in pairwise(found.items()):
        if same(value) != same(another):
            explanation = f'{place}"{one}" and "{other}" differ; expected one of them'
            bad("two keys differ", f"{explanation}, or the same content in both")
    return next(iter(found.values()), None)


def check_json(value: Any, place: str) -> None:
    """Raise BadRecord for a value that cannot be written as JSON text, or not in UTF-8."""
    try:
        # Within lists: the value may be nested as deep as Python can just write it.
        if not LONE_SURROGATE.search(json.dumps([[[value]]], ensure_ascii=False)):
            return
        found = "has half a surrogate pair"
    except (TypeError, ValueError, RecursionError) as error:
        found = f"cannot be written as JSON ({type(error).__name__})"
    bad("not valid JSON", f"{place} {found}; expected JSON values")


def is_filled(value: Any) -> bool:
    """Return whether a value holds something: no null, and nothing empty."""
    return value is not None and value != "" and value != [] and value != {}
