"""The turns of a ShareGPT record by their roles, which are named in many ways."""

from itertools import pairwise
from typing import Any

from data.dialogues.formats import AFTER, ROLES, Role

Turns = list[dict[str, Any]]


def speaker(turn: dict[str, Any]) -> Role:
    """Return who speaks, whatever the role is called."""
    return ROLES[turn["from"]]


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
    roles = [speaker(turn) for turn in turns]
    roles = roles[1:] if roles[:1] == ["system"] else roles
    follow = all(after in AFTER.get(before, ()) for before, after in pairwise(roles))
    return roles[:1] == ["user"] and follow
