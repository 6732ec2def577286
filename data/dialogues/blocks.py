"""Reads message blocks of Anthropic, Gemini and Bedrock as OpenAI messages."""

import json
from typing import Any

from data.dialogues.values import bad, kind
from data.errors import BadRecord

# Types of parts that are text; the last two are of OpenAI's Responses format.
TEXT_PARTS = ("text", "input_text", "output_text")
CALLS = ("tool_use", "toolUse", "functionCall", "function_call")
RESULTS = ("tool_result", "toolResult", "functionResponse", "function_response")
THOUGHTS = ("thinking", "reasoning", "reasoningContent")


def as_openai(message: dict[str, Any], text_key: str, number: int) -> list[dict[str, Any]]:
    """Return a message without blocks as a list of itself, else the messages of its blocks.

    A block with a tool result becomes a message of the role "tool", before the message's text.
    Raises BadRecord.
    """
    blocks = message.get(text_key)
    if not isinstance(blocks, list) or not any(map(_block_kind, blocks)):
        return [message]
    texts, calls, thoughts, results = [], [], [], []
    for block in blocks:
        found = _block_kind(block)
        if found in CALLS:
            calls.append(_call(block.get(found, block), number))
        elif found in RESULTS:
            results.append(_result(block.get(found, block), text_key, number))
        elif found in THOUGHTS:
            thoughts.append(_thought(block, found, number))
        else:
            texts.append(block)
    marks = {key: value for key, value in message.items() if key not in ("role", text_key)}
    rest = {**marks, text_key: texts or None}
    rest |= {"tool_calls": calls} if calls else {}
    rest |= {"thinking": "\n".join(thoughts)} if thoughts else {}
    if thoughts and not texts and not calls:
        rest[text_key] = ""
    return [*results, rest] if texts or calls or thoughts else results


def _block_kind(block: Any) -> str | None:
    """Return the kind of a block that is not text: its type, or its only key."""
    if not isinstance(block, dict):
        return None
    known = (*CALLS, *RESULTS, *THOUGHTS)
    if block.get("type") in known:
        return str(block["type"])
    if "type" in block:
        return None
    return next((key for key in known if isinstance(block.get(key), dict)), None)


def _call(call: Any, number: int) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        expected = 'expected an object with "name"'
        bad("invalid tool call", f"turn {number}: a tool call is {kind(call)}; {expected}")
    identity = next((call[key] for key in ("id", "toolUseId") if call.get(key)), None)
    arguments: Any = next((call[key] for key in ("input", "args", "arguments") if key in call), {})
    return {
        **({"id": identity} if identity is not None else {}),
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }


def _result(result: Any, text_key: str, number: int) -> dict[str, Any]:
    if not isinstance(result, dict):
        bad("invalid tool result", f"turn {number}: a tool result is {kind(result)}")
    keys = ("tool_use_id", "toolUseId", "id")
    identity = next((result[key] for key in keys if result.get(key)), None)
    content = result.get("content", result.get("response", ""))
    if isinstance(content, list):
        content = "".join(_result_text(part, number) for part in content)
    elif not isinstance(content, str):
        content = json.dumps(content, ensure_ascii=False)
    return {
        "role": "tool",
        text_key: content,
        **({"tool_call_id": identity} if identity is not None else {}),
        **({"name": result["name"]} if result.get("name") else {}),
    }


def _result_text(part: Any, number: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and "json" in part:
        return json.dumps(part["json"], ensure_ascii=False)
    found = part.get("type", next(iter(part), "")) if isinstance(part, dict) else kind(part)
    found = f"turn {number} has a tool result with {found!r}"
    raise BadRecord("part is not text", f"{found}; expected text alone")


def _thought(block: dict[str, Any], key: str, number: int) -> str:
    found = block.get(key, block.get("text"))
    if isinstance(found, dict):  # Bedrock's {"reasoningText": {"text": ...}}
        found = found.get("reasoningText", found)
        found = found.get("text") if isinstance(found, dict) else found
    if not isinstance(found, str):
        bad("value is not text", f'turn {number}: "{key}" is {kind(found)}; expected a string')
    return found
