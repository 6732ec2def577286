"""`python -m data convert`: converts dialogues of a known format to ShareGPT or messages."""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from data.dialogues.columns import from_columns, parse_columns, parse_roles
from data.dialogues.formats import from_alpaca, from_messages, from_sharegpt, to_messages
from data.dialogues.forms import Reading, as_sharegpt
from data.dialogues.preference import REJECTED
from data.dialogues.turns import turn_roles
from data.dialogues.values import kind
from data.errors import BadRecord, UserError
from data.preparation.job import Job, Result, parser, run, summary

FORMATS = ("auto", "sharegpt", "messages", "alpaca", "oasst", "columns")
READERS = {"sharegpt": from_sharegpt, "messages": from_messages, "alpaca": from_alpaca}


@dataclass(frozen=True)
class Settings:
    """The settings on which a conversion depends; columns: (part, column name) pairs."""

    format: str
    columns: tuple[tuple[str, str], ...]
    oasst_paths: Literal["best", "all"]
    to: Literal["sharegpt", "messages"] = "sharegpt"
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
    return command


def main(argv: list[str]) -> None:
    """Convert the files; raises UserError."""
    given = flags().parse_args(argv)
    format_ = "columns" if given.columns and given.format == "auto" else given.format
    parse_roles(given.roles)
    settings = Settings(
        format_,
        _columns(given.columns, format_),
        given.oasst_paths,
        given.to,
        given.preference,
        tuple(given.roles),
    )
    job = Job(
        name="convert",
        inputs=given.inputs,
        out=given.out,
        report=given.report,
        settings=asdict(settings),
        transform=partial(convert, settings),
        skip_bad=given.on_bad_record == "skip",
        processes=given.processes,
    )
    print(summary(run(job)), file=sys.stderr)


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
    tree = isinstance(record, dict) and isinstance(record.get("prompt"), dict)
    if settings.format == "oasst" or (settings.format == "auto" and tree):
        return _from_tree(record, number, settings.oasst_paths)
    if settings.format == "auto":
        how = Reading(settings.preference, parse_roles(settings.roles))
        try:
            converted = as_sharegpt(record, how)
        except BadRecord as bad:
            if bad.cause != REJECTED:
                raise
            return Result(number, dropped=(REJECTED,))
    elif not isinstance(record, dict):
        raise BadRecord("record is not an object", f"found {kind(record)}; expected an object")
    elif settings.format == "columns":
        converted = from_columns(record, dict(settings.columns), parse_roles(settings.roles))
    else:
        converted = READERS[settings.format](record)
    turn_roles(converted)
    return Result(str(converted.get("id", number)), (converted,))


def _from_tree(tree: Any, number: str, paths: str) -> Result:
    """Return the dialogues of an OpenAssistant tree; deleted messages are left out."""
    prompt = tree.get("prompt") if isinstance(tree, dict) else None
    if not isinstance(prompt, dict):
        raise BadRecord("not a tree", 'expected an object with "message_tree_id" and "prompt"')
    name = str(tree.get("message_tree_id") or number)
    if _role(prompt) != "human":
        raise BadRecord("unknown role", 'the prompt has the role assistant; expected "prompter"')
    language = {"lang": prompt["lang"]} if "lang" in prompt else {}
    found = _all_paths(prompt) if paths == "all" else _best_path(prompt)
    records = []
    for index, path in enumerate(found):
        turns = [{"from": _role(message), "value": message["text"]} for message in path]
        records.append({"id": f"{name}_{index}", "conversations": turns, **language})
        turn_roles(records[-1])
    return Result(name, tuple(records), dropped=() if records else ("no answer",))


def _role(message: dict[str, Any]) -> str:
    names = {"prompter": "human", "assistant": "gpt"}
    role, text = message.get("role"), message.get("text")
    if not isinstance(role, str) or role not in names:
        raise BadRecord("unknown role", f"found {str(role)[:40]}; expected prompter or assistant")
    if not isinstance(text, str):
        raise BadRecord("value is not text", f'"text" is {kind(text)}; expected a string')
    return names[role]


def _replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the replies that are not deleted, sorted by rank; replies without a rank are last."""
    replies = message.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise BadRecord("invalid replies", '"replies" has another type; expected a list of objects')
    if any(_role(reply) == _role(message) for reply in replies):
        raise BadRecord("turns do not alternate", "a reply has the same role as its parent")
    standing = [reply for reply in replies if not reply.get("deleted")]
    return sorted(standing, key=_rank)


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return rank if isinstance(rank, (int, float)) else float("inf")


Messages = tuple[dict[str, Any], ...]


def _best_path(prompt: dict[str, Any]) -> Iterator[Messages]:
    path = [] if prompt.get("deleted") else [prompt]
    while path and (replies := _replies(path[-1])):
        path.append(replies[0])
    if len(path) % 2:
        path = path[:-1]  # a question without an answer
    if path:
        yield tuple(path)


def _all_paths(prompt: dict[str, Any]) -> Iterator[Messages]:
    """Yield the path to each final answer: no reply to it has an answer."""
    waiting: list[Messages] = [] if prompt.get("deleted") else [(prompt,)]
    while waiting:
        path = waiting.pop()
        replies = _replies(path[-1])
        if _role(path[-1]) == "gpt":
            replies = [question for question in replies if _replies(question)]
            if not replies:
                yield path
        waiting += [(*path, reply) for reply in reversed(replies)]
