"""Reads the messages of a Discord export: a JSON file of DiscordChatExporter for each channel."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from data.errors import BadRecord, UserError
from data.files.containers import unpacked
from data.files.json_stream import Window, elements, next_mark, parse_or_skip, parse_value
from data.preparation.posts import Post, Speakers, attached

# Types of messages that someone has written.
WRITTEN = ("Default", "Reply", "ChatInputCommand", "ContextMenuCommand", "0", "19", "20")
HEAD = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"guild"\s*:\s*\{')
BROKEN = BadRecord("not a channel", 'found no object with "channel" and "messages"; expected both')


def is_discord_file(file: Path) -> bool:
    """Return whether a file begins as a channel of a Discord export."""
    with suppress(OSError, UserError), open(file, "rb") as opened:
        return any(HEAD.match(head) for _, _, head in unpacked(opened, file, Counter()))
    return False


def messages(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the channel and each message of a file one at a time; a bad one is a BadRecord."""
    try:
        with open(file, "rb") as opened:
            for name, stream, _ in unpacked(opened, file, Counter()):
                yield from _in_window(Window(stream, name, Counter()), file.stem)
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read: {error.strerror}. Give a readable file."
        ) from None


def _in_window(window: Window, channel: str) -> Iterator[tuple[str, Any]]:
    # The file is one object, which may be larger than memory: its keys are read one by one.
    if next_mark(window) != "{":
        yield channel, BROKEN
        return
    window.at += 1
    found = False
    while next_mark(window) == '"':
        key, end = parse_value(window)
        window.at = window.at if end is None else end
        if end is None or next_mark(window) != ":":
            yield channel, BROKEN
            return
        window.at += 1
        mark = next_mark(window)
        if key == "messages" and mark == "[":
            found = True
            window.at += 1
            for message in elements(window):
                yield channel, message
            if next_mark(window) != "]":
                return  # broken off: the last element was a BadRecord
            window.at += 1
        else:
            value, end = parse_or_skip(window)
            if end is None:
                yield channel, value
                return
            channel = _name(value, channel) if key == "channel" else channel
            window.at = end
        if next_mark(window) == ",":
            window.at += 1
    if not found or next_mark(window) != "}":
        yield channel, BROKEN


def _name(channel: Any, default: str) -> str:
    if not isinstance(channel, dict):
        return default
    name, number = channel.get("name"), channel.get("id")
    return f"{name} ({number})" if name and number else str(name or number or default)


def post(message: Any, channel: str, speakers: Speakers) -> Post:
    """Return the post of a message of a Discord export; raises BadRecord."""
    author = message.get("author") if isinstance(message, dict) else None
    if not isinstance(author, dict) or not isinstance(message.get("content"), str):
        raise BadRecord("not a message", 'a message has no "author" and "content"; expected both')
    time = message.get("timestamp")
    try:
        at = datetime.fromisoformat(str(time)).timestamp() if time is not None else 0.0
    except (ValueError, OverflowError):
        found = str(time)[:40]
        raise BadRecord("invalid time", f'"timestamp" is {found}; expected a date') from None
    speaker = str(author.get("id") or author.get("name") or "")
    name, tag = author.get("name"), author.get("discriminator")
    tagged = f"{name}#{tag}" if name and tag not in (None, "", "0000") else None
    speakers.add(speaker, [name, author.get("nickname"), tagged], bool(author.get("isBot")))
    type_ = str(message.get("type", "Default"))
    if type_ not in WRITTEN:
        return Post(channel, "", at, speaker, "", (f"system message ({type_}) left out",))
    lists = {"attachments": "attachment", "embeds": "embed", "stickers": "sticker"}
    text, causes = message["content"].strip(), attached(message, lists)
    causes += () if text else ("message without text left out",)
    return Post(channel, "", at, speaker, text, causes)
