"""The turns of a ShareGPT record by their roles, which are named in many ways."""

import json
from typing import Any, Literal, NoReturn

from data.errors import BadRecord

Speaker = Literal["user", "assistant", "system", "tool"]
SPEAKERS: dict[str, Speaker] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
# Who may speak before whom; "" is the beginning.
BEFORE: dict[Speaker, tuple[str, ...]] = {
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("assistant", "tool"),
}
Turns = list[dict[str, Any]]


def turns_of(record: Any) -> Turns:
    """Return the turns, all with a known role and text; raises BadRecord."""
    if not isinstance(record, dict):
        _bad("record is not an object", f"found {_kind(record)}; expected an object")
    turns = record.get("conversations")
    if not isinstance(turns, list):
        found = f"it is {_kind(turns)}" if "conversations" in record else "there is none"
        _bad("no conversations", f'expected a list under "conversations", but {found}')
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            expected = 'expected an object with "from" and "value"'
            _bad("turn is not an object", f"turn {number} is {_kind(turn)}; {expected}")
        role, value = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in SPEAKERS:
            found = f"the role {json.dumps(role)}" if "from" in turn else "no role"
            known = ", ".join(SPEAKERS)
            _bad("unknown role", f"turn {number} has {found[:80]}; expected one of {known}")
        if not isinstance(value, str):
            found = f'"value" is {_kind(value)}' if "value" in turn else 'there is no "value"'
            _bad("value is not text", f"turn {number}: {found}; expected a string")
    return list(turns)


def speaker(turn: dict[str, Any]) -> Speaker:
    """Return who speaks, whatever the role is called."""
    return SPEAKERS[turn["from"]]


def until_empty(turns: Turns) -> Turns:
    """Return the turns before the first one without text; a system turn without is left out."""
    if turns and speaker(turns[0]) == "system" and not turns[0]["value"].strip():
        turns = turns[1:]
    filled = [bool(turn["value"].strip()) for turn in turns]
    return turns[: filled.index(False)] if False in filled else turns


def from_first_user(turns: Turns) -> Turns:
    """Return the turns without those before the first of the user; a leading system turn stays."""
    system = turns[:1] if turns and speaker(turns[0]) == "system" else []
    speakers = [speaker(turn) for turn in turns]
    return system + turns[speakers.index("user") :] if "user" in speakers else []


def to_last_answer(turns: Turns) -> Turns:
    """Return the turns without those behind the assistant's last."""
    while turns and speaker(turns[-1]) != "assistant":
        turns = turns[:-1]
    return turns


def alternate(turns: Turns) -> bool:
    """Say whether user and assistant take turns; answers and tools may follow one another."""
    before = ""
    for turn in turns:
        if before not in BEFORE[speaker(turn)]:
            return False
        before = speaker(turn)
    return True


def _bad(cause: str, explanation: str) -> NoReturn:
    raise BadRecord(cause, explanation)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    kinds |= {int: "a number", float: "a number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
