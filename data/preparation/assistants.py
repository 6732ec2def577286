"""Reads conversations of the exports of ChatGPT and Claude (conversations.json)."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from data.dialogues.conversation import Role
from data.dialogues.exports import is_chatgpt, is_claude
from data.dialogues.values import kind
from data.errors import BadRecord
from data.preparation.job import Result
from data.preparation.messages import Message, dialogue

# Marks of sources in ChatGPT's text: private-use characters, and 【4†source】.
CITATION = re.compile("\ue200[^\ue201]*\ue201|【\\d+[^【】]*†[^【】]*】")
# ChatGPT's reasons for which an answer ends before its end.
BROKEN_OFF = ("interrupted", "max_tokens", "client_stopped")
CHATGPT_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}
CLAUDE_ROLES: dict[str, Role] = {"human": "user", "assistant": "assistant"}
# Claude's texts for blocks that its older exports leave out.
PLACEHOLDER = re.compile(r"\s*```\s*This block is not supported on your current device yet\.\s*```")


def from_chatgpt(record: dict[str, Any], number: str) -> Result:
    """Return the dialogue on the path to `current_node`; raises BadRecord.

    Edited branches, hidden system messages, custom instructions, tool messages and files are left
    out and counted.
    """
    nodes = record.get("mapping")
    if not isinstance(nodes, dict):
        raise BadRecord("no mapping", f'"mapping" is {kind(nodes)}; expected an object of nodes')
    given = {
        name: node["message"]
        for name, node in nodes.items()
        if isinstance(node, dict) and isinstance(node.get("message"), dict)
    }
    left_out: Counter[str] = Counter()
    found = [name for name in _path(nodes, record.get("current_node")) if name in given]
    beside = [one for name, one in given.items() if name not in {*found} and _is_shown(one)]
    left_out["message of another branch left out"] = len(beside)
    messages = [one for name in found if (one := _chatgpt_message(given[name], left_out))]
    first = next((n for n, one in enumerate(messages) if one.role != "system"), 0)
    late = [one for one in messages[first:] if one.role == "system"]
    left_out["system message left out"] += len(late)
    messages = messages[:first] + [one for one in messages[first:] if one.role != "system"]
    name = record.get("conversation_id") or record.get("id") or number
    return dialogue(str(name), messages, left_out)


def _path(nodes: dict[str, Any], last: Any) -> list[str]:
    """Return the names of the nodes from the root to `last`; without it, to the newest leaf."""
    if not isinstance(last, str) or last not in nodes:
        leaves = [name for name, node in nodes.items() if not _field(node, "children")]
        last = max(leaves, key=lambda name: _time(nodes[name]), default=None)
    path: dict[str, None] = {}
    while isinstance(last, str) and last in nodes and last not in path:
        path[last] = None
        last = _field(nodes[last], "parent")
    return [*path][::-1]


def _field(holder: Any, key: str) -> Any:
    return holder.get(key) if isinstance(holder, dict) else None


def _time(node: Any) -> float:
    time = _field(_field(node, "message"), "create_time")
    return time if isinstance(time, int | float) else 0.0


def _is_shown(message: dict[str, Any]) -> bool:
    """Return whether a message of ChatGPT is one of the user's or an answer."""
    role = _field(message.get("author"), "role")
    return role in ("user", "assistant") and bool(_chatgpt_message(message, Counter()))


def _chatgpt_message(message: dict[str, Any], left_out: Counter[str]) -> Message | None:
    """Return the message as text; None if it is left out, which is counted."""
    role = _field(message.get("author"), "role")
    content, metadata = message.get("content"), message.get("metadata")
    type_ = str(_field(content, "content_type"))
    if type_ == "thoughts" and role == "assistant":
        thoughts = _field(content, "thoughts")
        texts = [_field(one, "content") for one in thoughts] if isinstance(thoughts, list) else []
        return Message("assistant", "", "\n\n".join(one for one in texts if isinstance(one, str)))
    cause = _chatgpt_cause(role, type_, message)
    if not cause and role not in CHATGPT_ROLES:
        raise BadRecord("unknown role", f"found the role {str(role)[:40]}; expected user")
    parts: Counter[str] = Counter()
    text = _chatgpt_text(content, parts).strip()
    if cause:
        # Each conversation has a system message without text.
        left_out[cause] += bool(text) or cause != "system message left out"
        return None
    left_out.update(parts)
    finish = _field(_field(metadata, "finish_details"), "type")
    broken_off = role == "assistant" and (finish in BROKEN_OFF or _is_in_progress(message))
    return Message(CHATGPT_ROLES[role], text, broken_off=broken_off) if text else None


def _is_in_progress(message: dict[str, Any]) -> bool:
    return message.get("status") in ("in_progress", "finished_partial_completion")


def _chatgpt_cause(role: Any, type_: str, message: dict[str, Any]) -> str:
    """Return why a message of ChatGPT is left out; empty if it is not."""
    hidden = _field(message.get("metadata"), "is_visually_hidden_from_conversation") is True
    if type_ in ("user_editable_context", "model_editable_context"):
        return "custom instructions left out"
    if role == "tool":
        return "tool result left out"
    if role == "system" and hidden:
        return "system message left out"
    if role == "assistant" and message.get("recipient") not in (None, "all"):
        return "tool call left out"
    if type_ == "reasoning_recap":
        return "summary of reasoning left out"
    if hidden or message.get("weight") == 0:
        return "hidden message left out"
    return "" if type_ != "system_error" else "error message left out"


def _chatgpt_text(content: Any, left_out: Counter[str]) -> str:
    """Return the text of a message's content; its files are counted."""
    parts = _field(content, "parts")
    if not isinstance(parts, list):
        parts = [_field(content, "text")]
    texts = []
    for part in parts:
        words = part if isinstance(part, str) else _field(part, "text")  # a transcription
        if isinstance(words, str):
            texts.append(words)
        elif isinstance(part, dict):
            left_out[f"{_file_kind(part)} left out"] += 1
    text = "\n".join(texts)
    marks = len(CITATION.findall(text))
    left_out["citation mark left out"] += marks
    return CITATION.sub("", text) if marks else text


def _file_kind(part: dict[str, Any]) -> str:
    name = str(part.get("content_type"))
    return next((one for one in ("image", "audio", "video") if one in name), "attachment")


def from_claude(record: dict[str, Any], number: str) -> Result:
    """Return the dialogue of a conversation of Claude's export; raises BadRecord.

    Thinking is the answer's reasoning. Attachments, tool blocks and edited branches are left out
    and counted.
    """
    given = record.get("chat_messages")
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        found = f'"chat_messages" is {kind(given)}'
        raise BadRecord("no chat_messages", f"{found}; expected a list of objects")
    left_out: Counter[str] = Counter()
    path = _claude_path(given)
    left_out["message of another branch left out"] = len(given) - len(path)
    messages = [_claude_message(message, left_out) for message in path]
    return dialogue(str(record.get("uuid") or number), messages, left_out)


def _claude_path(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages up to the last one by `parent_message_uuid`; all without this key."""
    named = {message.get("uuid"): message for message in messages}
    parents = [message.get("parent_message_uuid") for message in messages]
    if len(named) < len(messages) or sum(one not in named for one in parents) != 1:
        return messages  # no tree with one root: an older export
    path: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] | None = messages[-1]
    while last is not None and id(last) not in path:
        path[id(last)] = last
        last = named.get(last.get("parent_message_uuid"))
    return [*path.values()][::-1]


def _claude_message(message: dict[str, Any], left_out: Counter[str]) -> Message:
    sender = message.get("sender")
    if sender not in CLAUDE_ROLES:
        found = f"found the sender {str(sender)[:40]}"
        raise BadRecord("unknown role", f"{found}; expected human or assistant")
    for key in ("attachments", "files"):
        files = message.get(key)
        left_out["attachment left out"] += len(files) if isinstance(files, list) else 0
    blocks = message.get("content")
    if not isinstance(blocks, list) or not blocks:
        return Message(CLAUDE_ROLES[sender], _without_placeholders(message.get("text"), left_out))
    texts, thinking = [], []
    for block in blocks:
        type_ = _field(block, "type")
        if type_ == "text":
            texts.append(_without_placeholders(_field(block, "text"), left_out))
        elif type_ == "thinking" and sender == "assistant":
            thinking.append(str(_field(block, "thinking") or ""))
        elif type_ in ("tool_use", "tool_result", "image", "document"):
            left_out[f"{type_.replace('_', ' ')} left out"] += 1
        else:
            left_out[f"block {str(type_)[:40]} left out"] += 1
    return Message(CLAUDE_ROLES[sender], "\n".join(texts), "\n\n".join(thinking))


def _without_placeholders(text: Any, left_out: Counter[str]) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise BadRecord("value is not text", f'"text" is {kind(text)}; expected a string')
    kept, count = PLACEHOLDER.subn("", text)
    left_out["tool use left out"] += count
    return kept


# The reader of each export by its name, and how a record of it is recognised.
EXPORTS: dict[str, tuple[Callable[[Any], bool], Callable[[dict[str, Any], str], Result]]] = {
    "chatgpt": (is_chatgpt, from_chatgpt),
    "claude": (is_claude, from_claude),
}
