"""Reads dialogues from the exports of Slack and Discord: channels in which an assistant answers."""

import html
import json
import re
import shlex
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from data.dialogues.formats import kind
from data.errors import BadRecord, UserError
from data.files.read import read_records
from data.preparation.job import Result
from data.preparation.messages import Message, dialogue

CHANNELS = ("slack", "discord")
# Files of a Slack export without messages.
SLACK_METADATA = {
    *("users.json", "org_users.json", "channels.json", "groups.json", "dms.json", "mpims.json"),
    *("integration_logs.json", "canvases.json", "lists.json", "huddle_transcripts.json"),
    *("file_conversations.json", "workflows.json", "external_members.json"),
}
# Slack's subtypes and Discord's types of messages that someone has written.
WRITTEN_SLACK: tuple[str | None, ...] = (
    None,
    "bot_message",
    "me_message",
    "thread_broadcast",
    "file_share",
)
WRITTEN_SLACK += ("file_comment", "reply_broadcast", "assistant_app_thread")
WRITTEN_DISCORD = ("Default", "Reply", "ChatInputCommand", "ContextMenuCommand", "0", "19", "20")
DAY = re.compile(r"\d{4}-\d\d-\d\d")
# For example <@U1>, <@U1|ann>, <#C1|general>, <!here>, <https://x|label>
SLACK_LINK = re.compile(r"<([@#!]?)([^<>|\n]+)(?:\|([^<>\n]*))?>")
NAMED_SPEAKERS = 8  # speakers that an error lists


@dataclass(frozen=True)
class Post:
    """A message of a channel.

    at: seconds since 1970. thread: its key, empty outside of threads. speaker: an id. left_out:
    causes to count; `text` is empty for a message that is left out whole.
    """

    channel: str
    thread: str
    at: float
    speaker: str
    text: str
    left_out: tuple[str, ...] = ()


@dataclass
class Speakers:
    """The names of each speaker by id, and the ids of bots."""

    names: dict[str, dict[str, None]] = field(default_factory=dict)
    bots: set[str] = field(default_factory=set)

    def add(self, speaker: str, names: Iterable[Any], bot: bool) -> None:
        """Add names of a speaker; the first is shown."""
        known = self.names.setdefault(speaker, {})
        known.update({str(name): None for name in names if name})
        if bot:
            self.bots.add(speaker)

    def name(self, speaker: str) -> str:
        """Return the first name of a speaker, or the id."""
        return next(iter(self.names.get(speaker, ())), speaker)

    def found(self, name: str) -> set[str]:
        """Return the ids of the speakers that have this id or name; case is ignored."""
        wanted = name.removeprefix("@").casefold()
        return {
            speaker
            for speaker, names in self.names.items()
            if wanted in (speaker.casefold(), *(one.casefold() for one in names))
        }


def channel_format(files: list[Path]) -> str | None:
    """Return "slack" or "discord" if the files are such an export, by the first record."""
    for file in files:
        if file.name in SLACK_METADATA:
            continue
        for _, record in islice(read_records(file), 1):
            if is_slack(record):
                return "slack"
            return "discord" if is_discord(record) else None
    return None


def is_slack(record: Any) -> bool:
    """Return whether a record is a message of a Slack export."""
    return isinstance(record, dict) and record.get("type") == "message" and "ts" in record


def is_discord(record: Any) -> bool:
    """Return whether a record is a channel of a Discord export (DiscordChatExporter)."""
    if not isinstance(record, dict) or not isinstance(record.get("channel"), dict):
        return False
    return isinstance(record.get("messages"), list) and "guild" in record


class Archive:
    """The posts of an export in a temporary SQLite file, so that memory is constant."""

    def __init__(self, format_: str, files: list[Path], skip_bad: bool) -> None:
        """Read the files; raises UserError for a bad record unless `skip_bad`."""
        self.speakers = Speakers()
        self.last = 0.0  # time of the post before
        self.base = sqlite3.connect("")  # an empty name is a temporary file
        self.base.execute("CREATE TABLE posts (channel, thread, at, speaker, text, left_out)")
        read = _slack_post if format_ == "slack" else _discord_post
        users = [file for file in files if file.name in ("users.json", "org_users.json")]
        for file in users if format_ == "slack" else ():
            for _, user in read_records(file):
                _add_slack_user(user, self.speakers)
        for file in files:
            if format_ == "slack" and file.name in SLACK_METADATA:
                continue
            rows = _slack_messages(file) if format_ == "slack" else _discord_messages(file)
            for number, (channel, message) in enumerate(rows):
                try:
                    if isinstance(message, BadRecord):
                        raise message
                    self._add(read(message, channel, self.speakers))
                except BadRecord as bad:
                    if not skip_bad:
                        raise UserError(
                            f"{file}: message {number}: {bad}. Correct the message, or leave out "
                            "all such messages with --on_bad_record skip."
                        ) from None
                    self._add(
                        Post(channel, "", self.last, "", "", (f"message left out ({bad.cause})",))
                    )

    def _add(self, post: Post) -> None:
        self.last = post.at
        row = (post.channel, post.thread, post.at, post.speaker, post.text)
        self.base.execute(
            "INSERT INTO posts VALUES (?,?,?,?,?,?)", (*row, json.dumps(post.left_out))
        )

    def assistant(self, names: list[str], command: str) -> tuple[str, ...]:
        """Return the ids of the assistant: of these names, or the only bot that writes.

        Raises UserError that lists the speakers; command: to be completed with --assistant.
        """
        query = "SELECT speaker, COUNT(*) FROM posts WHERE text != '' GROUP BY speaker ORDER BY 2"
        count: dict[str, int] = dict(self.base.execute(query + " DESC, 1"))
        bots = [one for one in count if one in self.speakers.bots]
        found = [self.speakers.found(name) & count.keys() for name in names]
        if all(found) and names:
            return tuple(sorted(set().union(*found)))
        if not names and len(bots) == 1:
            return (bots[0],)
        listed = [f"{self.speakers.name(one)} ({n:,})" for one, n in count.items()]
        speakers = ", ".join(listed[:NAMED_SPEAKERS]) + ", …" * (len(listed) > NAMED_SPEAKERS)
        wanted = next((n for n, one in zip(names, found, strict=True) if not one), None)
        problem = (
            f"--assistant {wanted}: no speaker has this name or id"
            if wanted
            else f"found {len(bots)} bots; expected --assistant with the name of who answers"
        )
        example = self.speakers.name((bots or [*count] or ["NAME"])[0])
        raise UserError(
            f"{problem}. Speakers with their messages: {speakers or 'none'}. For example:\n"
            f"{command} --assistant {shlex.quote(example)}"
        )

    def dialogues(self, pause: float) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield the posts of each dialogue, with its place.

        A thread is a dialogue; other posts of a channel are cut at pauses of more than `pause`
        seconds.
        """
        rows = self.base.execute("SELECT * FROM posts ORDER BY channel, thread, at, rowid")
        posts = (replace(Post(*row), left_out=tuple(json.loads(row[5]))) for row in rows)
        number = 0
        for (channel, thread), inside in groupby(posts, lambda one: (one.channel, one.thread)):
            for part in _cut(inside, float("inf") if thread else pause):
                identity = f"{channel}/{thread or _clock(part[0].at)}"
                kept = [[p.speaker, p.text, p.left_out] for p in part]
                yield {"id": identity, "posts": kept}, f"{channel}: record {number}"
                number += 1


def _cut(posts: Iterable[Post], pause: float) -> Iterator[list[Post]]:
    part: list[Post] = []
    for post in posts:
        if part and post.at - part[-1].at > pause:
            yield part
            part = []
        part.append(post)
    yield part


def _clock(at: float) -> str:
    return f"{at:.6f}".rstrip("0").rstrip(".")


def from_channel(record: dict[str, Any], assistant: tuple[str, ...]) -> Result:
    """Return the dialogue of posts; the speakers `assistant` answer, all others ask."""
    left_out = Counter(cause for _, _, causes in record["posts"] for cause in causes)
    messages = [
        Message("assistant" if speaker in assistant else "user", text, speaker=speaker)
        for speaker, text, _ in record["posts"]
        if text
    ]
    return dialogue(record["id"], messages, left_out)


def _add_slack_user(user: Any, speakers: Speakers) -> None:
    if isinstance(user, dict) and isinstance(user.get("id"), str):
        profile = _object(user.get("profile"))
        names = [profile.get("display_name"), user.get("name"), user.get("real_name")]
        more = [profile.get("real_name"), profile.get("bot_id")]
        speakers.add(user["id"], [*names, *more], bool(user.get("is_bot")))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _slack_messages(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the channel and each message of a file of a Slack export."""
    # A day's file is in the folder of its channel.
    stem = file.name.partition(".")[0]
    channel = file.parent.name if DAY.fullmatch(stem) and file.parent.name else stem
    for _, message in read_records(file):
        yield channel, message


def _slack_post(message: Any, channel: str, speakers: Speakers) -> Post:
    """Return the post of a message of a Slack export; raises BadRecord."""
    if not is_slack(message):
        found = f"the keys {', '.join(map(str, message))}" if isinstance(message, dict) else ""
        found = f"found {found or kind(message)}"[:80]
        raise BadRecord("not a message", f'{found}; expected "type": "message" and "ts"')
    thread = str(message.get("thread_ts") or "")
    try:
        at = float(message["ts"])
    except (TypeError, ValueError):
        raise BadRecord("invalid time", f'"ts" is {message["ts"]!r}; expected seconds') from None
    profile = _object(message.get("bot_profile"))
    bot = message.get("bot_id")
    speaker = str(message.get("user") or bot or message.get("username") or "")
    names = [profile.get("name"), message.get("username"), bot]
    person = _object(message.get("user_profile"))
    names += [person.get("display_name"), person.get("name"), person.get("real_name")]
    speakers.add(speaker, names, bool(bot) or message.get("subtype") == "bot_message")
    text, subtype = message.get("text"), message.get("subtype")
    if not isinstance(subtype, str | None) or subtype not in WRITTEN_SLACK:
        return Post(channel, thread, at, speaker, "", (f"system message ({subtype}) left out",))
    if not isinstance(text, str | None):
        raise BadRecord("value is not text", '"text" is no string; expected text')
    causes = _attached(message, {"files": "file", "attachments": "attachment"})
    words = SLACK_LINK.sub(lambda link: _slack_link(link, speakers), text or "").strip()
    words = html.unescape(words)
    causes += () if words else ("message without text left out",)
    return Post(channel, thread, at, speaker, words, causes)


def _slack_link(link: re.Match[str], speakers: Speakers) -> str:
    """Return the text of a mention or a link in Slack's markup."""
    sign, target, label = link.groups()
    if sign == "@":
        return "@" + (label or speakers.name(target))
    if sign == "#":
        return "#" + (label or target)
    if sign == "!":
        return label or "@" + target.partition("^")[0]
    return f"[{label}]({target})" if label and label != target else target.removeprefix("mailto:")


def _attached(message: dict[str, Any], names: dict[str, str]) -> tuple[str, ...]:
    """Return a cause for each file of a message, and for its reactions."""
    found = [name for key, name in names.items() for _ in message.get(key) or ()]
    found += ["reaction"] * len(message.get("reactions") or ())
    return tuple(f"{name} left out" for name in found)


def _discord_messages(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the channel and each message of a file of a Discord export."""
    for _, record in read_records(file):
        if not is_discord(record):
            found = 'found no "channel" and "messages"; expected both'
            bad = record if isinstance(record, BadRecord) else BadRecord("not a channel", found)
            yield file.stem, bad
            continue
        named = record["channel"]
        channel = str(named.get("name") or named.get("id") or file.stem)
        channel += f" ({named['id']})" if named.get("name") and named.get("id") else ""
        for message in record["messages"]:
            yield channel, message


def _discord_post(message: Any, channel: str, speakers: Speakers) -> Post:
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
    if type_ not in WRITTEN_DISCORD:
        return Post(channel, "", at, speaker, "", (f"system message ({type_}) left out",))
    lists = {"attachments": "attachment", "embeds": "embed", "stickers": "sticker"}
    text, causes = message["content"].strip(), _attached(message, lists)
    causes += () if text else ("message without text left out",)
    return Post(channel, "", at, speaker, text, causes)
