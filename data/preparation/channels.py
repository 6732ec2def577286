"""Makes dialogues of the exports of Slack and Discord: channels in which an assistant answers."""

import json
import shlex
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from data.errors import BadRecord, UserError
from data.files.read import kind_of
from data.preparation import discord, slack
from data.preparation.job import Result
from data.preparation.messages import Message, dialogue
from data.preparation.posts import Post, Speakers

CHANNELS = ("slack", "discord")
MOST_POSTS = 2000  # of a dialogue, which bounds memory
NAMED_SPEAKERS = 8  # speakers that an error lists


def channel_format(files: list[Path]) -> str | None:
    """Return "slack" or "discord" if the files are such an export, by the first of them."""
    for file in files:
        if file.name not in slack.METADATA:
            if discord.is_discord_file(file):
                return "discord"
            return "slack" if slack.is_slack_file(file) else None
    return None


def all_files(paths: list[Path]) -> list[Path]:
    """Return the files of paths; a folder's are all read, since its names are of channels."""
    found: list[Path] = []
    for path in paths:
        inside = [file for file in sorted(path.rglob("*")) if kind_of(file) and file.is_file()]
        found += inside if path.is_dir() else [path]
    return found


class Archive:
    """The posts of an export in a temporary SQLite file, so that memory is constant."""

    def __init__(self, format_: str, files: list[Path], skip_bad: bool) -> None:
        """Read the files; raises UserError for a bad record unless `skip_bad`."""
        self.speakers = Speakers()
        self.last = 0.0  # time of the post before
        self.base = sqlite3.connect("")  # an empty name is a temporary file
        self.base.execute("CREATE TABLE posts (channel, thread, at, speaker, text, left_out)")
        self.is_slack = format_ == "slack"
        read = slack.post if self.is_slack else discord.post
        for file in files:
            rows = slack.messages(file, self.speakers) if self.is_slack else discord.messages(file)
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
        seconds. Each has at most MOST_POSTS.
        """
        rows = self.base.execute("SELECT * FROM posts ORDER BY channel, thread, at, rowid")
        posts = (replace(Post(*row), left_out=tuple(json.loads(row[5]))) for row in rows)
        number = 0
        for (channel, thread), inside in groupby(posts, lambda one: (one.channel, one.thread)):
            for part in _cut(inside, float("inf") if thread else pause):
                identity = f"{channel}/{thread or _clock(part[0].at)}"
                kept = [[p.speaker, self._shown(p.text), p.left_out] for p in part]
                yield {"id": identity, "posts": kept}, f"{channel}: record {number}"
                number += 1

    def _shown(self, text: str) -> str:
        return slack.as_text(text, self.speakers) if self.is_slack else text


def _cut(posts: Iterable[Post], pause: float) -> Iterator[list[Post]]:
    part: list[Post] = []
    for post in posts:
        if part and (post.at - part[-1].at > pause or len(part) == MOST_POSTS):
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
