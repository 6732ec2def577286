"""Converts records of the known dialogue formats to ShareGPT."""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn

from data.dialogues.conversation import Role
from data.errors import BadRecord

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
    """Return the record with the system text as a turn, and tool calls and tools as objects."""
    turns = _list(record, "conversations")
    if any(isinstance(turn, dict) and "from" not in turn and "role" in turn for turn in turns):
        turns = _turns(turns)
    calls = any(isinstance(turn, dict) and turn.get("from") == "function_call" for turn in turns)
    if turns is record["conversations"] and not calls and not {"system", *TOOL_KEYS} & {*record}:
        return record
    turns = [_parsed_call(turn, number) for number, turn in enumerate(turns)]
    rest = {key: value for key, value in record.items() if key not in ("system", *TOOL_KEYS)}
    return {**rest, "conversations": _with_system(record, turns), **tools_of(record)}


def from_messages(record: dict[str, Any]) -> dict[str, Any]:
    """Return OpenAI messages as ShareGPT; reasoning and tool calls are keys of their turn."""
    turns = _with_system(record, _turns(_list(record, "messages")))
    return _replaced(record, ("messages", "system", *TOOL_KEYS), turns, tools_of(record))


TOOL_KEYS = ("tools", "functions")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Types of parts that are text; the last two are of OpenAI's Responses format.
TEXT_PARTS = ("text", "input_text", "output_text")
OTHER_PARTS = {"image", "image_url", "audio", "input_audio", "video", "video_url", "file"}


def tools_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record's tool definitions under "tools"; without any no key. Raises BadRecord."""
    found = {key: tools for key in TOOL_KEYS if (tools := _tools(record.get(key), key))}
    tools = _agreed(found)
    return {"tools": tools} if tools else {}


def _tools(given: Any, key: str) -> list[dict[str, Any]]:
    """Return the tool definitions that a key holds; raises BadRecord."""
    if isinstance(given, str):
        given = _json(given, f'"{key}"') if given.strip() else None
    if not given:
        return []
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        found = f'"{key}" is {kind(given)}'
        _bad("invalid tools", f"{found}; expected a list of objects, or one as JSON text")
    check_json(given, f'"{key}"')
    # The older format is the function alone.
    return [tool if "function" in tool else {"type": "function", "function": tool}
            for tool in given]  # fmt: skip


def _agreed(
    found: dict[str, Any], place: str = "", same: Callable[[Any], Any] = lambda x: x
) -> Any:
    """Return the value of the first key, None without keys; raises BadRecord if values differ.

    same: what is compared of a value.
    """
    for (one, value), (other, another) in pairwise(found.items()):
        if same(value) != same(another):
            explanation = f'{place}"{one}" and "{other}" differ; expected one of them'
            _bad("two keys differ", f"{explanation}, or the same content in both")
    return next(iter(found.values()), None)


def _with_system(record: dict[str, Any], turns: list[Any]) -> list[Any]:
    """Return the turns after a system turn with the record's system text, if it has any."""
    text = record.get("system")
    if text is None or (isinstance(text, str) and not text.strip()):
        return turns
    _text(record, "system")
    if turns and isinstance(turns[0], dict) and ROLES.get(str(turns[0].get("from"))) == "system":
        if turns[0].get("value") == text:
            return turns
        _bad("two system texts", 'found "system" and a system turn; expected one of them')
    return [{"from": "system", "value": text}, *turns]


def _parsed_call(turn: Any, number: int) -> Any:
    """Return a function_call turn, whose text is JSON in LLaMA-Factory, with tool calls."""
    if not isinstance(turn, dict) or turn.get("from") != "function_call":
        return turn
    thought, _, rest = _text(turn, "value", f"turn {number}: ").rpartition("</think>")
    try:
        found = json.loads(rest)
        calls = calls_of({"tool_calls": found if isinstance(found, list) else [found]}, number)
    except (ValueError, RecursionError, BadRecord):
        return turn  # A call in a form of its own, such as `f(1)`, stays text.
    both = {"value": calls, "tool_calls": calls_of(turn, number)}
    _agreed({key: one for key, one in both.items() if one}, f"turn {number}: ", _without_ids)
    kept = {key: turn[key] for key in ("train", "weight") if key in turn}
    thoughts = {
        "value": thought.strip().removeprefix("<think>").strip(),
        "reasoning": reasoning_of(turn, number),
    }
    thought = _agreed({key: one for key, one in thoughts.items() if one}, f"turn {number}: ")
    reasoning = {"reasoning": thought} if thought else {}
    return {"from": "gpt", "value": "", **reasoning, "tool_calls": calls, **kept}


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _bad("invalid JSON text", f"{what} is not valid JSON: {error}; expected JSON")


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
    used = ("instruction", "input", "output", "system", "history", *TOOL_KEYS)
    return _replaced(record, used, turns, tools_of(record))


def to_messages(record: dict[str, Any]) -> dict[str, Any]:
    """Return a ShareGPT record as OpenAI messages; `from_messages` returns the same record."""
    turns, messages = record["conversations"], []
    for number, turn in enumerate(turns):
        other = ("from", "value", "tool_calls", *REASONING_KEYS)
        message = {"role": ROLES[turn["from"]], "content": turn["value"]}
        if reasoning := reasoning_of(turn, number):
            message["reasoning_content"] = reasoning
        if calls := calls_of(turn, number):
            message["tool_calls"] = [
                {
                    **({"id": call["id"]} if "id" in call else {}),
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls
            ]
        messages.append({**message, **{k: v for k, v in turn.items() if k not in other}})
    return {"messages" if k == "conversations" else k: v for k, v in record.items()} | {
        "messages": messages
    }


def _replaced(
    record: dict[str, Any],
    keys: tuple[str, ...],
    turns: list[dict[str, Any]],
    more: dict[str, Any],
) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in keys}
    identity = {"id": kept.pop("id")} if "id" in kept else {}
    return {**identity, "conversations": turns, **kept, **more}


def _turns(messages: list[Any]) -> list[dict[str, Any]]:
    """Return messages with role and content as turns with from and value, and all else they say."""
    turns = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            expected = 'expected an object with "role" and "content"'
            _bad("turn is not an object", f"turn {number} is {kind(message)}; {expected}")
        names = ("train", "weight", "name", "tool_call_id")
        kept = {key: message[key] for key in names if message.get(key) is not None}
        reasoning = reasoning_of(message, number)
        kept |= {"reasoning": reasoning} if reasoning else {}
        calls = calls_of(message, number)
        kept |= {"tool_calls": calls} if calls else {}
        role = _role(message, "role", number)
        named = message["role"] == "function_call" and not calls
        text = _content(message, number, empty=bool(calls))
        turns.append({"from": "function_call" if named else SHAREGPT[role], "value": text, **kept})
    return turns


def _content(message: dict[str, Any], number: int, empty: bool) -> str:
    """Return a message's text; `empty`: there may be none."""
    content = message.get("content")
    if content is None and empty:
        return ""
    if not isinstance(content, list):
        return _text(message, "content", f"turn {number}: ")
    parts = []
    for part in content:
        found = _part_type(part)
        if found not in TEXT_PARTS:
            explanation = f"turn {number} has a part {str(found)[:40]!r}; expected text alone"
            _bad("part is not text", explanation)
        parts.append(_text(part, "text", f"turn {number}: a part's "))
    return "".join(parts)


def _part_type(part: Any) -> Any:
    """Return the type of a part of a message; without one, the key of its content."""
    if not isinstance(part, dict):
        return kind(part)
    filled = [key for key, value in part.items() if value not in (None, "", [], {})]
    # What stands beside the text, such as an image, would be lost.
    other = [key for key in filled if key in OTHER_PARTS]
    if part.get("type") in (None, *TEXT_PARTS) and other:
        return other[0]
    return part.get("type") or ("text" if "text" in part else next(iter(filled), "without content"))


def reasoning_of(turn: dict[str, Any], number: int) -> Any:
    """Return the reasoning of a turn, under any of its names; None if there is none.

    Raises BadRecord for two names with different texts.
    """
    return _agreed({key: turn[key] for key in REASONING_KEYS if turn.get(key)}, f"turn {number}: ")


def check_json(value: Any, place: str) -> None:
    """Raise BadRecord for a value that cannot be written as JSON text, or not in UTF-8."""
    try:
        # Within lists: the value may be nested as deep as Python can just write it.
        if not LONE_SURROGATE.search(json.dumps([[[value]]], ensure_ascii=False)):
            return
        found = "has half a surrogate pair"
    except (TypeError, ValueError, RecursionError) as error:
        found = f"cannot be written as JSON ({type(error).__name__})"
    _bad("not valid JSON", f"{place} {found}; expected JSON values")


def calls_of(message: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Return tool calls as objects with name, arguments as given, and the id if there is one.

    Raises BadRecord.
    """
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        wrong = f'turn {number}: "tool_calls" is {kind(calls)}'
        _bad("invalid tool call", f"{wrong}; expected a list")
    old = message.get("function_call")  # the older format: one call
    both = {
        "tool_calls": _calls(calls, number),
        "function_call": _calls([{"function": old}] if old else [], number),
    }
    filled = {key: found for key, found in both.items() if found}
    return _agreed(filled, f"turn {number}: ", _without_ids) or []


def _without_ids(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Return the names and arguments of calls; arguments as JSON text are parsed."""
    found = []
    for call in calls:
        arguments = call["arguments"]
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        found.append((call["name"], arguments))
    return found


def _calls(calls: list[Any], number: int) -> list[dict[str, Any]]:
    """Return the calls of a list as objects; raises BadRecord."""
    found: list[dict[str, Any]] = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            expected = "expected an object that names a function"
            _bad("invalid tool call", f"turn {number}: a tool call is {kind(call)}; {expected}")
        identity = {"id": str(call["id"])} if call.get("id") is not None else {}
        arguments = function.get("arguments", function.get("parameters", {}))
        others = {*function} - {"name", "arguments", "parameters", "id", "type", "index"}
        if filled := [key for key in others if function[key] not in (None, "", [], {})]:
            explanation = f"turn {number}: a tool call has {', '.join(map(str, sorted(filled)))}"
            _bad("invalid tool call", f'{explanation}; expected "name" and "arguments"')
        check_json([identity, function["name"], arguments], f"turn {number}: a tool call")
        found.append({**identity, "name": function["name"], "arguments": arguments})
    return found


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
        found = (
            f"the role {json.dumps(role, ensure_ascii=False, default=str)}"
            if key in turn
            else "no role"
        )
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
    filled = [bool(turn["value"].strip() or turn.get("tool_calls")) for turn in turns]
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
