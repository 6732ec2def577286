"""Reads tool definitions and tool calls of records and turns."""

import json
from contextlib import suppress
from typing import Any

from data.dialogues.values import agreed, bad, check_json, json_of, kind

TOOL_KEYS = ("tools", "functions", "toolConfig")
# The key of a function's JSON schema: Anthropic's and Bedrock's, beside OpenAI's.
SCHEMAS = ("input_schema", "inputSchema", "parametersJsonSchema")


def tools_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record's tool definitions under "tools"; without any no key. Raises BadRecord."""
    found = {key: tools for key in TOOL_KEYS if (tools := _tools(record.get(key), key))}
    tools = agreed(found)
    return {"tools": tools} if tools else {}


def _tools(given: Any, key: str) -> list[dict[str, Any]]:
    """Return the tool definitions that a key holds; raises BadRecord."""
    if isinstance(given, str):
        given = json_of(given, f'"{key}"') if given.strip() else None
    if not given:
        return []
    if isinstance(given, dict):
        # Bedrock's toolConfig holds the list.
        given = given["tools"] if isinstance(given.get("tools"), list) else [given]
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        found = f'"{key}" is {kind(given)}'
        bad("invalid tools", f"{found}; expected a list of objects, or one as JSON text")
    check_json(given, f'"{key}"')
    return [definition for tool in given for definition in _definitions(tool)]


def calls_of(message: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Return tool calls as objects with name, arguments as given, and the id if there is one.

    Raises BadRecord.
    """
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        wrong = f'turn {number}: "tool_calls" is {kind(calls)}'
        bad("invalid tool call", f"{wrong}; expected a list")
    old = message.get("function_call")  # the older format: one call
    both = {
        "tool_calls": _calls(calls, number),
        "function_call": _calls([{"function": old}] if old else [], number),
    }
    filled = {key: found for key, found in both.items() if found}
    return agreed(filled, f"turn {number}: ", without_ids) or []


def without_ids(calls: list[dict[str, Any]]) -> list[tuple[str, Any]]:
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
            bad("invalid tool call", f"turn {number}: a tool call is {kind(call)}; {expected}")
        identity = {"id": str(call["id"])} if call.get("id") is not None else {}
        arguments = function.get("arguments", function.get("parameters", {}))
        others = {*function} - {"name", "arguments", "parameters", "id", "type", "index"}
        if filled := [key for key in others if function[key] not in (None, "", [], {})]:
            explanation = f"turn {number}: a tool call has {', '.join(map(str, sorted(filled)))}"
            bad("invalid tool call", f'{explanation}; expected "name" and "arguments"')
        check_json([identity, function["name"], arguments], f"turn {number}: a tool call")
        found.append({**identity, "name": function["name"], "arguments": arguments})
    return found


def _definitions(tool: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the definitions of a tool in OpenAI's format; Gemini's tool holds several."""
    for key in ("functionDeclarations", "function_declarations"):
        if isinstance(tool.get(key), list):
            return [one for part in tool[key] for one in _definitions(part)]
    if "function" in tool:
        return [tool]
    function = tool["toolSpec"] if isinstance(tool.get("toolSpec"), dict) else tool
    schema = next((key for key in SCHEMAS if key in function), None)
    if schema:
        parameters = function[schema]
        if isinstance(parameters, dict) and isinstance(parameters.get("json"), dict):
            parameters = parameters["json"]
        rest = {key: value for key, value in function.items() if key != schema}
        function = {**rest, "parameters": parameters}
    return [{"type": "function", "function": function}]  # the older format: the function alone
