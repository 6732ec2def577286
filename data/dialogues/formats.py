"""Converts records of the known dialogue formats to ShareGPT."""

import json
import re
from contextlib import suppress
from itertools import pairwise
from typing import Any, Literal, NoReturn

from data.errors import BadRecord

Role = Literal["system", "user", "assistant", "tool"]
# All role names that are accepted, in any format.
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "system",  # OpenAI's name since its o1 models
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# ShareGPT's name of each role.
SHAREGPT: dict[Role, str] = {
    "system": "system",
    "user": "human",
    "assistant": "gpt",
    "tool": "tool",
}
# The roles that may follow a role; a system turn is first, before the user's.
AFTER: dict[Role, tuple[Role, ...]] = {
    "user": ("assistant",),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def as_sharegpt(record: Any) -> dict[str, Any]:
    """Return the record in ShareGPT format; a ShareGPT record is returned unchanged.

    The keys decide the format: ShareGPT (also with role and content), OpenAI messages or alpaca.
    Raises BadRecord.
    """
    if not isinstance(record, dict):
        _bad("record is not an object", f"found {kind(record)}; expected an object")
    if "conversations" in record:
        return from_sharegpt(record)
    if "messages" in record:
        return from_messages(record)
    if "instruction" in record and "output" in record:
        return from_alpaca(record)
    found = f"the keys {', '.join(map(str, record))}"[:80] if record else "no keys"
    expected = 'expected "conversations", "messages", or "instruction" and "output"'
    raise BadRecord("unknown format", f"found {found}; {expected}")


def turn_roles(record: dict[str, Any], surrogates: bool = False) -> list[Role]:
    """Return the role of each turn of a ShareGPT record; raises BadRecord for an invalid record.

    surrogates: whether text with half a surrogate pair is valid.
    """
    turns = _list(record, "conversations")
    roles: list[Role] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            expected = 'expected an object with "from" and "value"'
            _bad("turn is not an object", f"turn {number} is {kind(turn)}; {expected}")
        roles.append(_role(turn, "from", number))
        text = _text(turn, "value", f"turn {number}: ")
        if not surrogates and LONE_SURROGATE.search(text):
            found = f'turn {number}: "value" has half a surrogate pair'
            _bad("lone surrogate", f"{found}; expected text")
    return roles


def from_sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record, with keys role and content of its turns renamed to from and value."""
    turns = _list(record, "conversations")
    if any(isinstance(turn, dict) and "from" not in turn and "role" in turn for turn in turns):
        return {**record, "conversations": _turns(turns)}
    return record


def from_messages(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record of OpenAI messages as ShareGPT; a turn's tool calls follow its text."""
    return _replaced(record, ("messages",), _turns(_list(record, "messages")))


def from_alpaca(record: dict[str, Any]) -> dict[str, Any]:
    """Return an alpaca record as ShareGPT.

    The turns are system, history, then instruction with input, and output.
    """
    pairs = record.get("history") or []
    if not isinstance(pairs, list):
        _bad("history is not a list", f'"history" is {kind(pairs)}; expected a list of pairs')
    turns = []
    if record.get("system"):
        turns.append({"from": "system", "value": _text(record, "system")})
    for number, pair in enumerate(pairs):
        place = f"history {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            expected = "expected a list of a question and an answer"
            _bad("history is not pairs", f"{place} is {kind(pair)}; {expected}")
        for speaker, text in zip(("human", "gpt"), pair, strict=True):
            if not isinstance(text, str):
                _bad("value is not text", f"{place} has {kind(text)}; expected strings")
            turns.append({"from": speaker, "value": text})
    question, given = _text(record, "instruction"), ""
    if record.get("input") is not None:
        given = _text(record, "input")
    if given.strip():  # FastChat 0.2.36, fastchat/data/convert_alpaca.py
        question += f"\nInput:\n{given}"
    turns.append({"from": "human", "value": question})
    turns.append({"from": "gpt", "value": _text(record, "output")})
    return _replaced(record, ("instruction", "input", "output", "system", "history"), turns)


def _replaced(
    record: dict[str, Any], keys: tuple[str, ...], turns: list[dict[str, Any]]
) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in keys}
    identity = {"id": kept.pop("id")} if "id" in kept else {}
    return {**identity, "conversations": turns, **kept}


def _turns(messages: list[Any]) -> list[dict[str, Any]]:
    """Return the turns (from and value) of messages (role and content)."""
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            expected = 'expected an object with "role" and "content"'
            _bad("turn is not an object", f"turn {number} is {kind(message)}; {expected}")
        kept = {key: message[key] for key in ("train", "weight") if key in message}
        speaker = SHAREGPT[_role(message, "role", number)]
        turns.append({"from": speaker, "value": _content(message, number), **kept})
    return turns


def _content(message: dict[str, Any], number: int) -> str:
    calls, content = _calls(message, number), message.get("content")
    parts: list[str] = []
    if isinstance(content, list):
        for part in content:
            found = part.get("type") if isinstance(part, dict) else kind(part)
            if found != "text":
                explanation = f"turn {number} has a part {str(found)[:40]!r}; expected text"
                _bad("part is not text", explanation)
            parts.append(_text(part, "text", f"turn {number}: a part's "))
        parts = ["".join(parts)]
    elif content is not None or not calls:
        parts = [_text(message, "content", f"turn {number}: ")]
    return "\n".join([*filter(None, parts), *calls])


def _calls(message: dict[str, Any], number: int) -> list[str]:
    """Return a message's tool calls as text; arguments may be an object or a JSON string."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        found = f'turn {number}: "tool_calls" is {kind(calls)}'
        _bad("invalid tool call", f"{found}; expected a list")
    if message.get("function_call"):  # the older format: one call
        calls = [*calls, {"function": message["function_call"]}]
    texts = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = "expected an object with a function's name"
            _bad("invalid tool call", f"turn {number}: a tool call is {kind(call)}; {expected}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            # A model may write invalid JSON. Such arguments stay a string.
            with suppress(ValueError, RecursionError):
                parsed = json.loads(arguments)
                json.dumps([[[parsed]]])  # fails if it is nested too deeply to be written
                arguments = parsed
        named = {"name": function["name"], "arguments": arguments}
        texts.append(f"<tool_call>\n{json.dumps(named, ensure_ascii=False)}\n</tool_call>")
    return texts


def _list(record: dict[str, Any], key: str) -> list[Any]:
    turns = record.get(key)
    if not isinstance(turns, list):
        found = f'"{key}" is {kind(turns)}' if key in record else f'found no "{key}"'
        _bad(f"no {key}", f"{found}; expected a list of turns")
    if not turns:
        _bad("no turns", f'"{key}" is empty; expected a human turn and a gpt turn')
    return turns


def _role(turn: dict[str, Any], key: str, number: int) -> Role:
    role = turn.get(key)
    if not isinstance(role, str) or role not in ROLES:
        found = f"the role {json.dumps(role, ensure_ascii=False)}" if key in turn else "no role"
        _bad("unknown role", f"turn {number} has {found[:80]}; expected {', '.join(ROLES)}")
    return ROLES[role]


def _text(holder: dict[str, Any], key: str, place: str = "") -> str:
    value = holder.get(key)
    if not isinstance(value, str):
        found = f'"{key}" is {kind(value)}' if key in holder else f'found no "{key}"'
        _bad("value is not text", f"{place}{found}; expected a string")
    return value


def _bad(cause: str, explanation: str) -> NoReturn:
    raise BadRecord(cause, explanation)


def kind(value: Any) -> str:
    """Return the type of a JSON value in words; a Parquet value of another type keeps its name."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), f"a {type(value).__name__}")


Turns = list[dict[str, Any]]


def speaker(turn: dict[str, Any]) -> Role:
    """Return the role of a turn."""
    return ROLES[turn["from"]]


def until_empty(turns: Turns) -> Turns:
    """Return the turns before the first empty turn; an empty system turn is only left out."""
    if turns and speaker(turns[0]) == "system" and not turns[0]["value"].strip():
        turns = turns[1:]
    filled = [bool(turn["value"].strip()) for turn in turns]
    return turns[: filled.index(False)] if False in filled else turns


def from_first_user(turns: Turns) -> Turns:
    """Return a leading system turn and the turns from the first user turn on."""
    system = turns[:1] if turns and speaker(turns[0]) == "system" else []
    speakers = [speaker(turn) for turn in turns]
    return system + turns[speakers.index("user") :] if "user" in speakers else []


def to_last_answer(turns: Turns) -> Turns:
    """Return the turns up to the last assistant turn."""
    while turns and speaker(turns[-1]) != "assistant":
        turns = turns[:-1]
    return turns


def alternate(turns: Turns) -> bool:
    """Return whether the user is first, and each turn's role may follow the one before it."""
    roles = [speaker(turn) for turn in turns]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    follow = all(after in AFTER.get(before, ()) for before, after in pairwise(roles))
    return roles[:1] == ["user"] and follow
