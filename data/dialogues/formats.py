"""Converts ShareGPT, OpenAI messages and alpaca to ShareGPT, and ShareGPT to messages."""

from collections.abc import Mapping
from typing import Any

from data.dialogues.conversation import Role
from data.dialogues.pairs import list_turns, pair_turns
from data.dialogues.tools import TOOL_KEYS, calls_of, tools_of
from data.dialogues.turns import (
    REASONING_KEYS,
    ROLES,
    SYSTEM_KEYS,
    is_plain,
    parsed_json,
    reasoning_of,
    with_system,
)
from data.dialogues.values import list_at

BESIDE_TURNS = frozenset((*SYSTEM_KEYS, *TOOL_KEYS))


def from_sharegpt(
    record: dict[str, Any], roles: Mapping[str, Role] | None = None
) -> dict[str, Any]:
    """Return the record with the system text as a turn, and tool calls and tools as objects."""
    turns = parsed_json(record.get("conversations"))
    if isinstance(turns, list) and turns and all(map(is_plain, turns)):
        if turns is record["conversations"] and BESIDE_TURNS.isdisjoint(record):
            return record
    else:
        turns = list_turns(list_at({**record, "conversations": turns}, "conversations"), roles)
    rest = {key: value for key, value in record.items() if key not in BESIDE_TURNS}
    return {**rest, "conversations": with_system(record, turns), **tools_of(record)}


def from_messages(
    record: dict[str, Any], roles: Mapping[str, Role] | None = None
) -> dict[str, Any]:
    """Return OpenAI messages as ShareGPT; reasoning and tool calls are keys of their turn."""
    given = {**record, "messages": parsed_json(record.get("messages"))}
    turns = with_system(record, list_turns(list_at(given, "messages"), roles))
    return replaced(record, ("messages", *BESIDE_TURNS), turns, tools_of(record))


def from_alpaca(record: dict[str, Any], roles: Mapping[str, Role] | None = None) -> dict[str, Any]:
    """Return an alpaca record as ShareGPT.

    The turns are system, history, then instruction with input, and output.
    """
    turns = with_system(record, pair_turns(record, "instruction", "output", roles))
    used = ("instruction", "input", "output", "history", "context", *BESIDE_TURNS)
    return replaced(record, used, turns, tools_of(record))


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


def replaced(
    record: dict[str, Any],
    keys: tuple[str, ...],
    turns: list[dict[str, Any]],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Return the record with turns and more in place of the keys."""
    kept = {key: value for key, value in record.items() if key not in keys}
    identity = {"id": kept.pop("id")} if "id" in kept else {}
    return {**identity, "conversations": turns, **kept, **more}
