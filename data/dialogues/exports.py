"""Recognises records of exports and trees, which `python -m data convert` alone reads."""

from typing import Any


def is_chatgpt(record: Any) -> bool:
    """Return whether a record is a conversation of ChatGPT's export."""
    return isinstance(record, dict) and isinstance(record.get("mapping"), dict)


def is_claude(record: Any) -> bool:
    """Return whether a record is a conversation of Claude's export."""
    return isinstance(record, dict) and "chat_messages" in record


def is_tree(record: Any) -> bool:
    """Return whether a record is a message tree of OpenAssistant."""
    return isinstance(record, dict) and isinstance(record.get("prompt"), dict)


def is_slack(record: Any) -> bool:
    """Return whether a record is a message of a Slack export."""
    return isinstance(record, dict) and record.get("type") == "message" and "ts" in record


def is_discord(record: Any) -> bool:
    """Return whether a record is a channel of a Discord export (DiscordChatExporter)."""
    return isinstance(record, dict) and {"guild", "channel", "messages"} <= record.keys()


EXPORTS = (
    (is_chatgpt, 'ChatGPT export, by "mapping"'),
    (is_claude, 'Claude export, by "chat_messages"'),
    (is_tree, 'OASST tree, by "prompt"'),
    (is_slack, 'Slack export, by "type" and "ts"'),
    (is_discord, 'Discord export, by "guild" and "channel"'),
)


def export_of(record: Any) -> str | None:
    """Return the kind of export of a record, and the field that decided; None for others."""
    return next((name for recognised, name in EXPORTS if recognised(record)), None)
