"""Reads the turns of a dialogue under the keys and role names of any project."""

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from data.dialogues.blocks import TEXT_PARTS, as_openai
from data.dialogues.conversation import Role
from data.dialogues.tools import calls_of, without_ids
from data.dialogues.values import LONE_SURROGATE, agreed, bad, is_filled, kind, list_at, text_at
from data.errors import BadRecord

# Role names, in any format; capitals are read as small letters.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("human", "user", "prompter", "user_input", "customer"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("model", "bot", "ai", "chatbot", "chat_bot", "llm"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "environment"), "tool"),
    **dict.fromkeys(("tool_response", "tool_result", "tool_output", "tool_results"), "tool"),
    **dict.fromkeys(("function_response", "function_result", "tool_responses"), "tool"),
}
# Roles of turns whose text is a tool call as JSON.
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
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
PLAIN_ROLES = frozenset(ROLES) - {*CALL_ROLES}
ROLE_KEYS = ("from", "role", "speaker", "author", "sender")
TEXT_KEYS = ("value", "content", "text", "markdown", "message", "utterance", "parts")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
SYSTEM_KEYS = (
    *("system", "system_prompt", "system_message", "systemPrompt", "systemMessage"),
    *("meta_prompt", "meta_instruction", "system_instruction", "systemInstruction"),
)
# Marks of turns and records: 1 and true supervise, 0 and false do not.
MARKS = ("train", "training", "weight", "loss", "loss_weight", "loss_scale", "loss_mask")
# Marks without a common meaning; `masked` is torchtune's: true does not supervise.
OTHER_MARKS = ("mask", "masked")
ALL_MARKS = frozenset({*MARKS, *OTHER_MARKS})


def is_supervised(holder: dict[str, Any], place: str) -> bool:
    """Return whether the marks of a turn or a record supervise it; the default is yes.

    Raises BadRecord for a mark with another value than 0, 1, true and false.
    """
    supervised = True
    for key in ALL_MARKS.intersection(holder):
        value = holder[key]
        if value is None:
            continue
        # A list equals none of these, and 0.0 equals 0.
        if key == "mask" or value not in (True, False) or isinstance(value, str | list | dict):
            found = f'"{key}" {json.dumps(value, default=str)[:40]}'
            marks = "expected true or false, 0 or 1"
            if key == "mask":
                marks = 'which has no common meaning; expected "train" with true or false'
                bad("unknown weight", f"{place}found {found}, {marks}")
            bad("unknown weight", f"{place}found {found}; {marks}")
        supervised &= bool(value) != (key == "masked")
    return supervised


def role_of(name: Any, roles: Mapping[str, Role] | None = None) -> Role | None:
    """Return the role of a name, None for an unknown name; roles: further names."""
    if not isinstance(name, str):
        return None
    if roles and name in roles:
        return roles[name]
    if name in ROLES:
        return ROLES[name]
    small = name.strip().lower()
    return ROLES.get(small) or ROLES.get(small.replace(" ", "_").replace("-", "_"))


def turn_roles(record: dict[str, Any], surrogates: bool = False) -> list[Role]:
    """Return the role of each turn of a ShareGPT record; raises BadRecord for an invalid record.

    surrogates: whether text with half a surrogate pair is valid.
    """
    turns = list_at(record, "conversations")
    roles: list[Role] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            expected = 'expected an object with "from" and "value"'
            bad("turn is not an object", f"turn {number} is {kind(turn)}; {expected}")
        roles.append(role_at(turn, "from", number))
        text = text_at(turn, "value", f"turn {number}: ")
        if not surrogates and LONE_SURROGATE.search(text):
            found = f'turn {number}: "value" has half a surrogate pair'
            bad("lone surrogate", f"{found}; expected text")
    return roles


def is_plain(turn: Any) -> bool:
    """Return whether a turn is ShareGPT's own: `from` a known role, and `value`."""
    if not isinstance(turn, dict) or "value" not in turn:
        return False
    name = turn.get("from")
    return isinstance(name, str) and name in PLAIN_ROLES and isinstance(turn["value"], str)


def as_turns(messages: list[Any], roles: Mapping[str, Role] | None = None) -> list[dict[str, Any]]:
    """Return messages of any project as ShareGPT turns, with all else that they hold.

    roles: further role names. Raises BadRecord.
    """
    turns = []
    for number, given in enumerate(messages):
        if not isinstance(given, dict):
            expected = 'expected an object with "role" and "content"'
            bad("turn is not an object", f"turn {number} is {kind(given)}; {expected}")
        role_key = next((key for key in ROLE_KEYS if key in given), "role")
        if isinstance(given.get(role_key), dict):  # {"author": {"role": ...}}
            given = {**given, role_key: given[role_key].get("role")}
        role = role_at(given, role_key, number, roles)
        text_key = next((key for key in TEXT_KEYS if is_filled(given.get(key))), None)
        text_key = text_key or next((key for key in TEXT_KEYS if key in given), None)
        text_key = text_key or ("value" if role_key == "from" else "content")
        for message in as_openai(given, text_key, number):
            turn = _turn(message, role, text_key, number)
            is_call = str(given[role_key]).strip().lower() in CALL_ROLES
            turns.append(_parsed_call(turn, number) if is_call else turn)
    return turns


def _turn(message: dict[str, Any], role: Role, text_key: str, number: int) -> dict[str, Any]:
    role = "tool" if message.get("role") == "tool" else role
    names = ("name", "tool_call_id", *MARKS, *OTHER_MARKS)
    kept = {key: message[key] for key in names if message.get(key) is not None}
    reasoning = reasoning_of(message, number)
    kept |= {"reasoning": reasoning} if reasoning else {}
    calls = calls_of(message, number)
    kept |= {"tool_calls": calls} if calls else {}
    text = _content(message, text_key, number, empty=bool(calls))
    return {"from": SHAREGPT[role], "value": text, **kept}


def _content(message: dict[str, Any], key: str, number: int, empty: bool) -> str:
    """Return a message's text; `empty`: there may be none."""
    content = message.get(key)
    if content is None and empty:
        return ""
    if not isinstance(content, list):
        return text_at(message, key, f"turn {number}: ")
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append(part)
            continue
        found = _part_type(part)
        if found not in TEXT_PARTS:
            explanation = f"turn {number} has a part {str(found)[:40]!r}; expected text alone"
            bad("part is not text", explanation)
        name = "text" if "text" in part else "value" if "value" in part else "text"
        parts.append(text_at(part, name, f"turn {number}: a part's "))
    return "".join(parts)


OTHER_PARTS = {"image", "image_url", "audio", "input_audio", "video", "video_url", "file"}


def _part_type(part: Any) -> Any:
    """Return the type of a part of a message; without one, the key of its content."""
    if not isinstance(part, dict):
        return kind(part)
    filled = [key for key, value in part.items() if is_filled(value)]
    # What stands beside the text, such as an image, would be lost.
    other = [key for key in filled if key in OTHER_PARTS]
    if part.get("type") in (None, *TEXT_PARTS) and other:
        return other[0]
    return part.get("type") or ("text" if "text" in part else next(iter(filled), "without content"))


def reasoning_of(turn: dict[str, Any], number: int) -> Any:
    """Return the reasoning of a turn, under any of its names; None if there is none.

    Raises BadRecord for two names with different texts.
    """
    return agreed({key: turn[key] for key in REASONING_KEYS if turn.get(key)}, f"turn {number}: ")


def role_at(
    turn: dict[str, Any], key: str, number: int, roles: Mapping[str, Role] | None = None
) -> Role:
    """Return the role that a key of a turn names; raises BadRecord."""
    name = turn.get(key)
    role = role_of(name, roles)
    if role is None:
        shown = json.dumps(name, ensure_ascii=False, default=str)[:60]
        found = f"the role {shown}" if key in turn else "no role"
        quoted = shlex.quote(str(name))
        remedy = f"Name it with --roles user={quoted} or assistant={quoted}"
        explanation = f"turn {number} has {found}; expected {', '.join(ROLES)}"
        # The flag separates names by commas.
        named = isinstance(name, str) and name.isprintable() and name.strip() and "," not in name
        raise BadRecord("unknown role", explanation, remedy if named else "")
    return role


def system_text(record: dict[str, Any]) -> str | None:
    """Return the system text that a record's keys hold, None without any; raises BadRecord."""
    found = {}
    for key in SYSTEM_KEYS:
        value = record.get(key)
        if isinstance(value, dict):  # Gemini's, or a message
            value = next(
                (value[name] for name in ("parts", "content", "text") if name in value), value
            )
        if isinstance(value, list):
            value = _content({key: value}, key, 0, empty=False) if value else None
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        found[key] = text_at({key: value}, key)
    system: str | None = agreed(found)
    return system


def with_system(record: dict[str, Any], turns: list[Any]) -> list[Any]:
    """Return the turns after a system turn with the record's system text, if it has any."""
    text = system_text(record)
    if text is None:
        return turns
    if turns and isinstance(turns[0], dict) and role_of(turns[0].get("from")) == "system":
        if turns[0].get("value") == text:
            return turns
        bad("two system texts", 'found "system" and a system turn; expected one of them')
    return [{"from": "system", "value": text}, *turns]


def _parsed_call(turn: dict[str, Any], number: int) -> dict[str, Any]:
    """Return a turn whose text is a call as JSON, as LLaMA-Factory's, with tool calls."""
    thought, _, rest = text_at(turn, "value", f"turn {number}: ").rpartition("</think>")
    try:
        found = json.loads(rest)
        calls = calls_of({"tool_calls": found if isinstance(found, list) else [found]}, number)
    except (ValueError, RecursionError, BadRecord):
        return turn  # A call in a form of its own, such as `f(1)`, stays text.
    both = {"value": calls, "tool_calls": calls_of(turn, number)}
    agreed({key: one for key, one in both.items() if one}, f"turn {number}: ", without_ids)
    kept = {key: turn[key] for key in (*MARKS, *OTHER_MARKS) if key in turn}
    thoughts = {
        "value": thought.strip().removeprefix("<think>").strip(),
        "reasoning": reasoning_of(turn, number),
    }
    thought = agreed({key: one for key, one in thoughts.items() if one}, f"turn {number}: ")
    reasoning = {"reasoning": thought} if thought else {}
    return {"from": "gpt", "value": "", **reasoning, "tool_calls": calls, **kept}


def parsed_json(value: Any) -> Any:
    """Return the list that JSON text holds, as in a CSV column; any other value unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value
