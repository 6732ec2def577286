"""Reads dialogues from the message trees of OpenAssistant (oasst1, oasst2)."""

from collections.abc import Iterator
from typing import Any

from data.dialogues.turns import turn_roles
from data.dialogues.values import kind
from data.errors import BadRecord
from data.preparation.job import Result

Messages = tuple[dict[str, Any], ...]


def from_tree(tree: Any, number: str, paths: str) -> Result:
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
    noted: tuple[str, ...] = ()
    if paths == "best" and records:
        others = sum(1 for _ in _messages(prompt)) - len(records[0]["conversations"])
        noted = ("message of another path left out",) * others
    dropped = () if records else ("no answer",)
    return Result(name, tuple(records), dropped=dropped, noted=noted)


def _messages(prompt: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all messages of a tree that are not deleted."""
    waiting = [prompt]
    while waiting:
        message = waiting.pop()
        if not message.get("deleted"):
            yield message
        replies = message.get("replies")
        if isinstance(replies, list):
            waiting += [reply for reply in replies if isinstance(reply, dict)]


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
