"""Reads the messages of a Slack export: CHANNEL/DAY.json and users.json, in a folder or a zip."""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from data.dialogues.exports import is_slack
from data.dialogues.values import kind
from data.errors import BadRecord
from data.files.read import placed_records
from data.preparation.posts import Post, Speakers, attached

# Files of a Slack export without messages.
USERS = ("users.json", "org_users.json")
METADATA = {
    *("users.json", "org_users.json", "channels.json", "groups.json", "dms.json", "mpims.json"),
    *("integration_logs.json", "canvases.json", "lists.json", "huddle_transcripts.json"),
    *("file_conversations.json", "workflows.json", "external_members.json"),
}
# Subtypes of messages that someone has written.
WRITTEN: tuple[str | None, ...] = (
    None,
    "bot_message",
    "me_message",
    "thread_broadcast",
    "file_share",
)
WRITTEN += ("file_comment", "reply_broadcast", "assistant_app_thread")
DAY = re.compile(r"\d{4}-\d\d-\d\d")
# For example <@U1>, <@U1|ann>, <#C1|general>, <!here>, <https://x|label>
LINK = re.compile(r"<([@#!]?)([^<>|\n]+)(?:\|([^<>\n]*))?>")


def is_slack_file(file: Path) -> bool:
    """Return whether the first message of a file, or of an archive, is of a Slack export."""
    for record, place in placed_records(file):
        if _member(place).name not in METADATA:
            return is_slack(record)
    return False


def messages(file: Path, speakers: Speakers) -> Iterator[tuple[str, Any]]:
    """Yield the channel and each message of a file, and add the users of the workspace."""
    for record, place in placed_records(file):
        member = _member(place)
        if member.name in USERS:
            _add_user(record, speakers)
        if member.name in METADATA:
            continue
        stem = member.name.partition(".")[0]
        # A day's file is in the folder of its channel.
        yield (member.parent.name if DAY.fullmatch(stem) else "") or stem, record


def _member(place: str) -> PurePath:
    """Return the path of the file, or of the archive's member, of a record's place."""
    return PurePath(place.rpartition(": record ")[0])


def _add_user(user: Any, speakers: Speakers) -> None:
    if isinstance(user, dict) and isinstance(user.get("id"), str):
        profile = _object(user.get("profile"))
        names = [profile.get("display_name"), user.get("name"), user.get("real_name")]
        more = [profile.get("real_name"), profile.get("bot_id")]
        speakers.add(user["id"], [*names, *more], bool(user.get("is_bot")), first=True)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def post(message: Any, channel: str, speakers: Speakers) -> Post:
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
    if not isinstance(subtype, str | None) or subtype not in WRITTEN:
        return Post(channel, thread, at, speaker, "", (f"system message ({subtype}) left out",))
    if not isinstance(text, str | None):
        raise BadRecord("value is not text", '"text" is no string; expected text')
    causes = attached(message, {"files": "file", "attachments": "attachment"})
    text = (text or "").strip()
    causes += () if text else ("message without text left out",)
    return Post(channel, thread, at, speaker, text, causes)


def as_text(text: str, speakers: Speakers) -> str:
    """Return Slack's markup as text: mentions by name, and links in Markdown."""
    return html.unescape(LINK.sub(lambda link: _link(link, speakers), text))


def _link(link: re.Match[str], speakers: Speakers) -> str:
    """Return the text of a mention or a link in Slack's markup."""
    sign, target, label = link.groups()
    if sign == "@":
        return "@" + (label or speakers.name(target))
    if sign == "#":
        return "#" + (label or target)
    if sign == "!":
        return label or "@" + target.partition("^")[0]
    return f"[{label}]({target})" if label and label != target else target.removeprefix("mailto:")
