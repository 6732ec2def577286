"""Makes dialogues of the messages of a chat: joins them, and counts what is left out."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from data.dialogues.conversation import Role
from data.dialogues.trim import from_first_user, to_last_answer
from data.dialogues.turns import SHAREGPT, turn_roles
from data.preparation.job import Result


@dataclass(frozen=True)
class Message:
    """One message of a chat.

    reasoning: of the assistant. broken_off: whether an answer ends before its end.
    """

    role: Role
    text: str
    reasoning: str = ""
    speaker: str = ""
    broken_off: bool = False


def dialogue(identity: str, messages: Iterable[Message], left_out: Counter[str]) -> Result:
    """Return the dialogue of the messages; consecutive messages of one role are one turn.

    It begins with a user turn and ends with an answer. left_out: counts by cause, which are noted.
    Raises BadRecord for text that cannot be written.
    """
    noted = Counter(left_out)
    turns = [_turn([*run], noted) for _, run in groupby(messages, lambda one: one.role)]
    turns = [turn for turn in turns if turn["value"]]
    asked = from_first_user(turns)
    answered = to_last_answer(asked)
    if not any(turn["from"] == SHAREGPT["user"] for turn in answered):
        cause = "no question with an answer"
        return Result(identity, dropped=(cause,), noted=tuple(left_out.elements()))
    noted["answer before the first question left out"] += len(turns) - len(asked)
    noted["question without an answer left out"] += len(asked) - len(answered)
    record = {"id": identity, "conversations": answered}
    turn_roles(record)
    return Result(identity, (record,), noted=tuple(noted.elements()))


def _turn(messages: list[Message], noted: Counter[str]) -> dict[str, Any]:
    """Return consecutive messages of one role as a turn, joined by line breaks."""
    written = sum(bool(one.text.strip()) for one in messages)
    noted["consecutive messages joined"] += max(0, written - 1)
    if len({one.speaker for one in messages if one.text}) > 1:
        noted["turn of several users"] += 1
    text = "\n".join(one.text.strip() for one in messages if one.text.strip())
    turn: dict[str, Any] = {"from": SHAREGPT[messages[0].role], "value": text}
    if reasoning := "\n\n".join(one.reasoning.strip() for one in messages if one.reasoning.strip()):
        turn["reasoning"] = reasoning
    if messages[-1].broken_off:
        noted["answer broken off, not trained"] += 1
        turn["train"] = False
    return turn
