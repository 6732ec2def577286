"""Converts questions with answers, lists of pairs and marked text to ShareGPT turns."""

import json
import re
from collections.abc import Mapping
from typing import Any

from data.dialogues.conversation import Role
from data.dialogues.tools import calls_of
from data.dialogues.turns import ALL_MARKS, ROLE_KEYS, as_turns, parsed_json
from data.dialogues.values import bad, is_filled, kind, text_at

Turns = list[dict[str, Any]]
QUESTIONS = ("prompt", "question", "query", "instruction", "input", "human", "user", "problem")
ANSWERS = (
    *("completion", "response", "answer", "answers", "output", "assistant", "gpt", "bot"),
    *("solution", "target"),
)
CONTEXTS = ("input", "context")
# xtuner's mark of a pair; false: the answer is not supervised.
PAIR_MARK = "output_with_loss"
# Texts with marked turns: ChatML, Guanaco and hh-rlhf. The first group is the role.
MARKED = (
    re.compile(r"<\|im_start\|>[ ]*([^\n]*)\n"),
    re.compile(r"(?:^|\n*)### (Human|Assistant|User|System):[ \n]?"),
    re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?"),
)
END = "<|im_end|>"
# The same turns in glaive's function calling.
GLAIVE = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):[ ]*")
FUNCTION_CALL = re.compile(r"<functioncall>\s*(\{.*\})", re.DOTALL)


def pair_keys(holder: dict[str, Any]) -> tuple[str, str] | None:
    """Return the keys of a question and of its answer, None without both."""
    answer = next((key for key in ANSWERS if is_filled(holder.get(key))), None)
    answer = answer or next((key for key in ANSWERS if key in holder), None)
    question = next((key for key in QUESTIONS if is_filled(holder.get(key))), None)
    return (question, answer) if question and answer else None


def pair_turns(
    record: dict[str, Any],
    question: str,
    answer: str,
    roles: Mapping[str, Role] | None = None,
) -> Turns:
    """Return history, the question with its input or context, and the answer as turns."""
    turns = history_turns(record.get("history"), roles)
    asked = side_turns(record, question, "human", roles)
    for key in CONTEXTS:
        if key not in (question, answer) and record.get(key) is not None:
            given = text_at(record, key)
            if given.strip():  # FastChat 0.2.36, fastchat/data/convert_alpaca.py
                asked[-1]["value"] += f"\nInput:\n{given}"
    return [*turns, *asked, *side_turns(record, answer, "gpt", roles)]


def side_turns(
    record: dict[str, Any], key: str, speaker: str, roles: Mapping[str, Role] | None = None
) -> Turns:
    """Return the turns of a prompt or an answer: text, a message, or a list of messages."""
    value = record.get(key)
    if isinstance(value, dict) and any(name in value for name in ROLE_KEYS):
        value = [value]
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return as_turns(value, roles)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    elif isinstance(value, list):
        found = f'"{key}" is a list of {len(value)}'
        bad("several answers", f"{found}; expected one text, or a list of messages")
    return [{"from": speaker, "value": text_at({key: value} if key in record else {}, key)}]


def history_turns(given: Any, roles: Mapping[str, Role] | None = None) -> Turns:
    """Return the turns of a history: a list of pairs, or of messages; raises BadRecord."""
    pairs = parsed_json(given) or []
    if not isinstance(pairs, list):
        bad("history is not a list", f'"history" is {kind(pairs)}; expected a list of pairs')
    if pairs and all(isinstance(pair, dict) for pair in pairs):
        return list_turns(pairs, roles)
    turns = []
    for number, pair in enumerate(pairs):
        place = f"history {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            expected = "expected a list of a question and an answer"
            bad("history is not pairs", f"{place} is {kind(pair)}; {expected}")
        for speaker, text in zip(("human", "gpt"), pair, strict=True):
            if not isinstance(text, str):
                bad("value is not text", f"{place} has {kind(text)}; expected strings")
            turns.append({"from": speaker, "value": text})
    return turns


def list_turns(given: list[Any], roles: Mapping[str, Role] | None = None) -> Turns:
    """Return a list of turns, of pairs or of alternating strings as turns; raises BadRecord."""
    if len(given) > 1 and all(isinstance(one, str) for one in given):
        return [
            {"from": "gpt" if number % 2 else "human", "value": text}
            for number, text in enumerate(given)
        ]
    if not is_pair(given[0] if given else None):
        return as_turns(given, roles)
    turns: Turns = []
    for number, pair in enumerate(given):
        keys = pair_keys(pair) if isinstance(pair, dict) else None
        if keys is None:
            bad("turn is not a pair", f"turn {number} is no question with its answer")
        if is_filled(pair.get("system")):
            if number:
                bad("two system texts", f"pair {number} has a system text; expected it in pair 0")
            turns.append({"from": "system", "value": text_at(pair, "system")})
        marks = {key: pair[key] for key in ALL_MARKS.intersection(pair)}
        if PAIR_MARK in pair:
            marks["train"] = pair[PAIR_MARK]
        question, answer = pair_turns({**pair, "history": None}, *keys, roles)
        turns += [question, {**answer, **marks}]
    return turns


def is_pair(value: Any) -> bool:
    """Return whether an element of a list is a question with its answer, not a turn."""
    if not isinstance(value, dict) or any(key in value for key in ROLE_KEYS):
        return False
    return pair_keys(value) is not None


def is_turn(value: Any) -> bool:
    """Return whether an element of a list is a turn: it has a role."""
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS)


def marked_turns(text: str, roles: Mapping[str, Role] | None = None) -> Turns | None:
    """Return the turns of a text with marked roles, such as ChatML; None for any other text."""
    for pattern in MARKED:
        found = [*pattern.finditer(text)]
        if len(found) < 2 or text[: found[0].start()].strip(" \n"):
            continue
        ends = [*(match.start() for match in found[1:]), len(text)]
        messages = []
        for match, end in zip(found, ends, strict=True):
            value = text[match.end() : end]
            if pattern is MARKED[0]:
                value, closed, rest = value.partition(END)
                if (closed and rest.strip()) or (not closed and end != len(text)):
                    bad("invalid ChatML", f"found text outside of turns or no {END}")
            else:
                value = value.rstrip("\n")
            messages.append({"role": match[1].strip(), "content": value})
        return as_turns(messages, roles)
    return None


def glaive_turns(record: dict[str, Any]) -> dict[str, Any]:
    """Return turns and tools of a record of glaive's function calling; raises BadRecord."""
    system = text_at(record, "system") if is_filled(record.get("system")) else ""
    system, tools = _glaive_tools(system.strip().removeprefix("SYSTEM:").strip())
    text = text_at(record, "chat")
    found = [*GLAIVE.finditer(text)]
    ends = [*(match.start() for match in found[1:]), len(text)]
    turns: Turns = [{"from": "system", "value": system}] if system else []
    for match, end in zip(found, ends, strict=True):
        value = text[match.end() : end].strip().removesuffix("<|endoftext|>").strip()
        call = FUNCTION_CALL.fullmatch(value)
        if match[1] == "ASSISTANT" and call:
            turns.append({"from": "gpt", "value": "", "tool_calls": _glaive_call(call[1])})
        else:
            names = {"USER": "human", "ASSISTANT": "gpt", "FUNCTION RESPONSE": "tool"}
            turns.append({"from": names[match[1]], "value": value})
    return {"turns": turns, "tools": tools}


def _glaive_call(text: str) -> list[dict[str, Any]]:
    """Return the call that the text holds; its arguments are JSON in single quotes."""
    match = re.fullmatch(r'\{"name":\s*("[^"]*"),\s*"arguments":\s*\'(.*)\'\s*\}', text, re.DOTALL)
    try:
        if match:
            call = {"name": json.loads(match[1]), "arguments": json.loads(match[2])}
        else:
            call = json.loads(text)
    except ValueError:
        bad("invalid tool call", f"found the call {text[:60]!r}; expected JSON")
    return calls_of({"tool_calls": [call]}, 0)


def _glaive_tools(system: str) -> tuple[str, list[Any]]:
    """Return the system text before its tool definitions, and the definitions."""
    head, brace, rest = system.partition("{")
    if not brace or "function" not in head:
        return system, []
    rest, tools, decoder = brace + rest, list[Any](), json.JSONDecoder()
    try:
        while rest:
            tool, end = decoder.raw_decode(rest)
            tools.append(tool)
            rest = rest[end:].strip().lstrip(",").strip()
    except (ValueError, RecursionError):
        return system, []  # All of it stays text.
    return head.rstrip(" \n-"), tools
