"""Selects turns of a ShareGPT record: from the first question to the last answer."""

from itertools import pairwise
from typing import Any

from data.dialogues.conversation import Role
from data.dialogues.turns import AFTER, ROLES

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
