"""Recognises the form of a record by its keys, and converts it to ShareGPT."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from data.dialogues.columns import from_columns
from data.dialogues.conversation import Role
from data.dialogues.exports import export_of
from data.dialogues.formats import from_alpaca, from_messages, from_sharegpt, replaced
from data.dialogues.pairs import (
    ANSWERS,
    CONTEXTS,
    QUESTIONS,
    glaive_turns,
    is_pair,
    is_turn,
    list_turns,
    marked_turns,
    pair_keys,
    pair_turns,
)
from data.dialogues.preference import PREFERENCE_KEYS, without_rejected
from data.dialogues.tools import TOOL_KEYS, calls_of, tools_of
from data.dialogues.turns import SYSTEM_KEYS, as_turns, parsed_json, with_system
from data.dialogues.values import bad, is_filled, json_of, kind
from data.errors import BadRecord

Roles = Mapping[str, Role]
Convert = Callable[[Any, Roles], dict[str, Any]]
TURN_LISTS = (
    *("conversation", "dialog", "dialogue", "dialogs", "items", "turns", "data", "chat"),
    *("contents", "chat_history", "thread", "history"),
)
MEDIA_KEYS = frozenset(("image", "images", "audio", "audios", "video", "videos"))
ORIGINAL = ("ShareGPT", "messages", "alpaca")  # forms that the account does not name
CONVERT = "python -m data convert --in {file} --out data.jsonl"


@dataclass(frozen=True)
class Form:
    """The form of a record.

    field: the key that decided. convert: returns the record as ShareGPT. keys: the keys it reads.
    """

    name: str
    field: str
    convert: Convert
    keys: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Reading:
    """How records are read.

    preference: "chosen" takes the chosen answers of preference data. roles: further role names.
    columns: the column of each part; empty: the record's keys decide.
    """

    preference: Literal["refuse", "chosen"] = "refuse"
    roles: Roles = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)


DEFAULT_READING = Reading()
SHAREGPT_FORM = Form("ShareGPT", "conversations", from_sharegpt, frozenset(("conversations",)))
MESSAGES_FORM = Form("messages", "messages", from_messages, frozenset(("messages",)))
ALPACA_KEYS = frozenset(("instruction", "input", "output", "history"))
ALPACA_FORM = Form("alpaca", "instruction", from_alpaca, ALPACA_KEYS)


def as_sharegpt(record: Any, how: Reading = DEFAULT_READING) -> dict[str, Any]:
    """Return the record in ShareGPT format; a ShareGPT record is returned unchanged.

    Raises BadRecord.
    """
    return read_form(record, how)[0]


def read_form(record: Any, how: Reading = DEFAULT_READING) -> tuple[dict[str, Any], Form]:
    """Return the record in ShareGPT format, and its form; raises BadRecord."""
    given = record
    if isinstance(record, dict):
        if not PREFERENCE_KEYS.isdisjoint(record):
            record = without_rejected(record, how.preference == "chosen")
        if not MEDIA_KEYS.isdisjoint(record):
            media = sorted(key for key in MEDIA_KEYS if is_filled(record.get(key)))
            if media:
                explanation = (
                    f'found "{media[0]}"; expected text alone: the model sees no {media[0]}'
                )
                bad(f"{media[0]} with text", explanation)
    if how.columns and isinstance(record, dict):
        keys = frozenset((*how.columns.values(), "history"))
        form = Form("columns", "--columns", partial(_from_columns, how.columns), keys)
    else:
        form = recognise(record)
    converted = form.convert(record, how.roles)
    if record is not given:  # The answers that are left out are counted by the form's name.
        keys = form.keys | (given.keys() - record.keys())
        form = replace(form, name=f"{form.name}, chosen answers", keys=keys)
    return converted, form


def recognise(record: Any) -> Form:
    """Return the form of a record by its keys; the first that fits. Raises BadRecord."""
    if isinstance(record, list) and record and (is_turn(record[0]) or is_pair(record[0])):
        return Form("list of turns", "the record", lambda one, roles: _with_turns({}, one, roles))
    if not isinstance(record, dict):
        bad("record is not an object", f"found {kind(record)}; expected an object")
    if "conversations" in record:
        return SHAREGPT_FORM
    if export := export_of(record):
        keys = ", ".join(f'"{key}"' for key in record)[:120]
        explanation = f"found the keys {keys}: a {export}; expected turns with roles"
        raise BadRecord("export", explanation, f"Convert it first: {CONVERT}")
    if "messages" in record:
        return MESSAGES_FORM
    if "instruction" in record and "output" in record:
        return ALPACA_FORM
    for key in ("body", "request"):
        body = record.get(key)
        if isinstance(body, dict) and isinstance(body.get("messages"), list):
            return _form("OpenAI batch", key, partial(_from_batch, key), "response")
    if isinstance(record.get("contents"), list):
        return _form("Gemini", "contents", partial(_from_list, "contents"))
    if {"query", "answers", "tools"} <= record.keys():
        return _form("xlam", "answers", _from_xlam, "query")
    if isinstance(record.get("chat"), str) and "ASSISTANT:" in record["chat"]:
        return _form("glaive", "chat", _from_glaive)
    if isinstance(record.get("instances"), list) and "instruction" in record:
        return _form("seed task", "instances", _from_seed_task, "instruction")
    pair = pair_keys(record)
    for key in TURN_LISTS:
        if (key != "history" or not pair) and _is_dialogue(record.get(key)):
            return _form("list of turns", key, partial(_from_list, key))
    if pair:
        _check_one_pair(record, *pair)
        convert = partial(_from_pair, *pair)
        return _form("/".join(pair), pair[1], convert, pair[0], "history", *CONTEXTS)
    for key, value in record.items():
        if isinstance(value, list) and value and (is_turn(value[0]) or is_pair(value[0])):
            return _form("list of turns", key, partial(_from_list, key))
    if isinstance(record.get("text"), str) and marked_turns(record["text"]) is not None:
        return _form("marked text", "text", _from_text)
    raise _unknown(record)


def _check_one_pair(record: dict[str, Any], question: str, answer: str) -> None:
    """Raise BadRecord for a record in which several keys may be the question, or the answer.

    A key that adds to a question does not count.
    """
    questions = [key for key in QUESTIONS if key not in CONTEXTS and is_filled(record.get(key))]
    answers = [key for key in ANSWERS if is_filled(record.get(key))]
    for found, part in ((questions, "question"), (answers, "answer")):
        if len(found) > 1:
            explanation = f"{' and '.join(map(json.dumps, found))} may each be the {part}"
            remedy = f"Name the columns: {CONVERT} --columns user={question} assistant={answer}"
            cause = f"several keys for the {part}"
            raise BadRecord(cause, f"{explanation}; expected one of them", remedy)


def _form(name: str, key: str, convert: Convert, *keys: str) -> Form:
    return Form(name, key, convert, frozenset((key, *keys)))


def _is_dialogue(value: Any) -> bool:
    value = parsed_json(value)
    if not isinstance(value, list) or not value:
        return False
    texts = len(value) > 1 and all(isinstance(one, str) for one in value)
    return texts or is_turn(value[0]) or is_pair(value[0])


def _unknown(record: dict[str, Any]) -> BadRecord:
    """Return the error for a record of no known form, with the command that reads it."""
    keys = ", ".join(map(str, record))
    found = f"found the keys {keys}"[:160] if record else "found no keys"
    texts = [key for key, value in record.items() if isinstance(value, str) and key != "id"]
    if len(texts) > 1:
        columns = f"user={texts[0]} assistant={texts[1]}"
        remedy = f"Name the columns: {CONVERT} --columns {columns}"
    else:
        remedy = ""
    if texts == ["text"]:
        expected = "expected a text that marks who speaks, as ChatML does"
        return BadRecord("text without roles", f"{found}; {expected}")
    expected = 'expected "conversations", "messages", "instruction" and "output", "prompt" and '
    return BadRecord("unknown format", f'{found}; {expected}"completion", or the like', remedy)


def _from_columns(
    columns: Mapping[str, str], record: dict[str, Any], roles: Roles
) -> dict[str, Any]:
    return from_columns(record, columns, roles)


def _with_turns(
    record: dict[str, Any], turns: list[Any], roles: Roles, *keys: str
) -> dict[str, Any]:
    """Return a record with the turns of a list, its system text and its tools."""
    turns = with_system(record, list_turns(turns, roles))
    return replaced(record, (*keys, *SYSTEM_KEYS, *TOOL_KEYS), turns, tools_of(record))


def _from_list(key: str, record: dict[str, Any], roles: Roles) -> dict[str, Any]:
    return _with_turns(record, parsed_json(record[key]), roles, key)


def _from_pair(question: str, answer: str, record: dict[str, Any], roles: Roles) -> dict[str, Any]:
    turns = with_system(record, pair_turns(record, question, answer, roles))
    used = (question, answer, "history", *CONTEXTS, *SYSTEM_KEYS, *TOOL_KEYS)
    return replaced(record, used, turns, tools_of(record))


def _from_text(record: dict[str, Any], roles: Roles) -> dict[str, Any]:
    turns = with_system(record, marked_turns(record["text"], roles) or [])
    return replaced(record, ("text", *SYSTEM_KEYS, *TOOL_KEYS), turns, tools_of(record))


def _from_batch(key: str, record: dict[str, Any], roles: Roles) -> dict[str, Any]:
    """Return an OpenAI request, with its response if the record holds it."""
    body, answer = record[key], record.get("response")
    answer = answer.get("body", answer) if isinstance(answer, dict) else None
    turns = as_turns(body["messages"], roles)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        turns += as_turns([choices[0].get("message")], roles)
    identity = record.get("id", record.get("custom_id"))
    return {
        **({"id": identity} if identity is not None else {}),
        "conversations": with_system(body, turns),
        **tools_of(body),
    }


def _from_xlam(record: dict[str, Any], roles: Roles) -> dict[str, Any]:
    """Return a query with the calls that answer it, as in xlam-function-calling-60k."""
    calls = record["answers"]
    calls = json_of(calls, '"answers"') if isinstance(calls, str) else calls
    called = {"from": "gpt", "value": "", "tool_calls": calls_of({"tool_calls": calls}, 1)}
    asked = pair_turns({**record, "answers": ""}, "query", "answers", roles)[:-1]
    used = ("query", "answers", "history", *CONTEXTS, *SYSTEM_KEYS, *TOOL_KEYS)
    return replaced(record, used, with_system(record, [*asked, called]), tools_of(record))


def _from_glaive(record: dict[str, Any], roles: Roles) -> dict[str, Any]:
    found = glaive_turns(record)
    tools = tools_of({"tools": found["tools"]}) or tools_of(record)
    return replaced(record, ("chat", "system", *TOOL_KEYS), found["turns"], tools)


def _from_seed_task(record: dict[str, Any], roles: Roles) -> dict[str, Any]:
    """Return the instruction with its only instance, as in self-instruct's seed tasks."""
    instances = record["instances"]
    if len(instances) != 1 or not isinstance(instances[0], dict):
        found = f'"instances" has {len(instances)} elements'
        bad("several answers", f"{found}; expected one object with input and output")
    rest = {key: value for key, value in record.items() if key != "instances"}
    return from_alpaca({**rest, **instances[0]}, roles)
