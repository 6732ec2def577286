"""`python -m data convert`: converts dialogues of a known format to ShareGPT or messages."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from data.dialogues.columns import from_columns, parse_columns, parse_roles
from data.dialogues.exports import is_tree
from data.dialogues.formats import from_alpaca, from_messages, from_sharegpt, to_messages
from data.dialogues.forms import Reading, as_sharegpt
from data.dialogues.preference import REJECTED
from data.dialogues.turns import turn_roles
from data.dialogues.values import kind
from data.errors import BadRecord, UserError
from data.files.read import find_files
from data.preparation.assistants import EXPORTS
from data.preparation.channels import CHANNELS, Archive, all_files, channel_format, from_channel
from data.preparation.job import Job, Result, parser, run, summary
from data.preparation.oasst import from_tree
from data.preparation.parallel import Read, records_of

FORMATS = ("auto", "sharegpt", "messages", "alpaca", "oasst", "columns", *EXPORTS, *CHANNELS)
# Files beside conversations.json in the exports of ChatGPT and Claude.
COMPANIONS = {
    *("user", "users", "user_settings", "message_feedback", "model_comparisons", "memories"),
    *("shared_conversations", "group_chats", "projects", "shopping", "sora", "export_manifest"),
}
READERS = {"sharegpt": from_sharegpt, "messages": from_messages, "alpaca": from_alpaca}


@dataclass(frozen=True)
class Settings:
    """The settings on which a conversion depends.

    columns: (part, column name) pairs. assistant: ids of the assistant in a channel's export.
    pause: seconds between two dialogues of a channel.
    """

    format: str
    columns: tuple[tuple[str, str], ...]
    oasst_paths: Literal["best", "all"]
    to: Literal["sharegpt", "messages"] = "sharegpt"
    assistant: tuple[str, ...] = ()
    pause: float = 3600.0
    preference: Literal["refuse", "chosen"] = "refuse"
    roles: tuple[str, ...] = ()


def flags() -> argparse.ArgumentParser:
    """Return the command's parser."""
    command = parser("convert", "Convert dialogues of a known format to ShareGPT or messages.")
    own = command.add_argument_group("convert")
    own.add_argument("--format", choices=FORMATS, default="auto", help="auto: by the record's keys")
    own.add_argument(
        "--columns", nargs="+", default=[], metavar="PART=NAME",
        help="columns of a table: user=question assistant=answer [system=...] [id=...]",
    )  # fmt: skip
    own.add_argument(
        "--oasst_paths", choices=("best", "all"), default="best",
        help="best: the best-ranked reply at each turn; all: one dialogue per final answer",
    )  # fmt: skip
    own.add_argument(
        "--roles", nargs="+", default=[], metavar="ROLE=NAME",
        help="role names of the data: user=human,Human assistant=bot",
    )  # fmt: skip
    own.add_argument(
        "--preference", choices=("refuse", "chosen"), default="refuse",
        help="chosen: take the chosen answers of preference data, and count the others",
    )  # fmt: skip
    own.add_argument(
        "--to", choices=("sharegpt", "messages"), default="sharegpt",
        help="messages: in the format of OpenAI's chat completions",
    )  # fmt: skip
    own.add_argument(
        "--assistant", nargs="+", default=[], metavar="NAME",
        help="name or id of the assistant in a Slack or Discord export; default: its only bot",
    )  # fmt: skip
    own.add_argument(
        "--pause", type=_minutes, default=60.0, metavar="MINUTES",
        help="a longer pause in a channel of Slack or Discord begins another dialogue",
    )  # fmt: skip
    return command


def main(argv: list[str]) -> None:
    """Convert the files; raises UserError."""
    given = flags().parse_args(argv)
    skip_bad, format_ = given.on_bad_record == "skip", given.format
    format_ = "columns" if given.columns and format_ == "auto" else format_
    files = _without_companions(find_files(given.inputs)) if format_ == "auto" else given.inputs
    if format_ == "auto":
        format_ = channel_format(files) or format_
    parse_roles(given.roles)
    settings = Settings(
        format_,
        _columns(given.columns, format_),
        given.oasst_paths,
        given.to,
        preference=given.preference,
        roles=tuple(given.roles),
    )
    read: Read = records_of
    if format_ in CHANNELS:
        files = all_files(given.inputs)
        archive = Archive(format_, files, skip_bad)
        command = f"python -m data convert --in {shlex.join(map(str, given.inputs))}"
        command += f" --out {shlex.quote(str(given.out))}"
        assistant = archive.assistant(given.assistant, command)
        names = ", ".join(map(archive.speakers.name, assistant))
        print(f"convert: {format_} export; the assistant is {names}", file=sys.stderr)
        settings = replace(settings, assistant=assistant, pause=60 * given.pause)

        def read(files: list[Path], notes: Counter[str] | None) -> Iterator[tuple[Any, str]]:
            return archive.dialogues(settings.pause)

    elif given.assistant:
        raise UserError(f"--assistant: only Slack and Discord exports need it, not {format_}.")
    job = Job(
        name="convert",
        inputs=files,
        out=given.out,
        report=given.report,
        settings=asdict(settings),
        transform=partial(convert, settings),
        skip_bad=skip_bad,
        processes=given.processes,
        read=read,
    )
    print(summary(run(job)), file=sys.stderr)


def _minutes(word: str) -> float:
    try:
        minutes = float(word)
    except ValueError:
        minutes = -1.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"found {word}; expected a number of minutes above 0")
    return minutes


def _without_companions(files: list[Path]) -> list[Path]:
    """Return the files without those that ChatGPT and Claude export beside conversations.json."""
    folders = {file.parent for file in files if file.name == "conversations.json"}
    left_out = [f for f in files if f.parent in folders and f.name.partition(".")[0] in COMPANIONS]
    if left_out:
        names = ", ".join(file.name for file in left_out)
        print(f"convert: left out files without conversations: {names}", file=sys.stderr)
    return [file for file in files if file not in left_out]


def _columns(words: list[str], format_: str) -> tuple[tuple[str, str], ...]:
    if format_ != "columns":
        if words:
            raise UserError(f"--columns: --format {format_} has no columns. Leave out one of both.")
        return ()
    return tuple(parse_columns(words).items())


def convert(settings: Settings, record: Any, place: str) -> Result:
    """Return the record's dialogues in the format of --to; raises BadRecord."""
    result = _as_sharegpt(settings, record, place)
    if settings.to == "messages":
        return replace(result, records=tuple(map(to_messages, result.records)))
    return result


def _as_sharegpt(settings: Settings, record: Any, place: str) -> Result:
    number = place.rpartition(" ")[2]
    if settings.format in CHANNELS:
        return from_channel(record, settings.assistant)
    if settings.format == "oasst" or (settings.format == "auto" and is_tree(record)):
        return from_tree(record, number, settings.oasst_paths)
    for name, (recognised, read) in EXPORTS.items():
        if settings.format == name or (settings.format == "auto" and recognised(record)):
            return read(_object(record), number)
    if settings.format == "auto":
        how = Reading(settings.preference, parse_roles(settings.roles))
        try:
            converted = as_sharegpt(record, how)
        except BadRecord as bad:
            if bad.cause != REJECTED:
                raise
            return Result(number, dropped=(REJECTED,))
    elif settings.format == "columns":
        roles = parse_roles(settings.roles)
        converted = from_columns(_object(record), dict(settings.columns), roles)
    else:
        converted = READERS[settings.format](_object(record))
    turn_roles(converted)
    return Result(str(converted.get("id", number)), (converted,))


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRecord("record is not an object", f"found {kind(record)}; expected an object")
    return record
