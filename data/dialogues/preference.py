"""Takes the chosen answers of preference data; rejected answers are never supervised."""

from typing import Any

from data.dialogues.pairs import QUESTIONS, is_turn, marked_turns, pair_keys
from data.dialogues.values import bad, is_filled
from data.errors import BadRecord

CHOSEN_KEYS = ("chosen", "chosen_response")
REJECTED_KEYS = ("rejected", "rejected_response", "rejected_messages", "rejected_answer")
LABEL_KEYS = ("label", "kto_tag")
PREFERENCE_KEYS = frozenset((*CHOSEN_KEYS, *REJECTED_KEYS, *LABEL_KEYS))
REMEDY = (
    "Take the chosen answers with --preference chosen, in training and in "
    "python -m data convert --in {file} --out data.jsonl --preference chosen"
)
REJECTED = "rejected answer"  # the cause; --preference chosen counts these


def without_rejected(record: dict[str, Any], take_chosen: bool) -> dict[str, Any]:
    """Return the record with its chosen answer alone.

    Raises BadRecord for preference data unless `take_chosen`, and for a rejected answer.
    """
    found = [key for key in (*CHOSEN_KEYS, *REJECTED_KEYS) if is_filled(record.get(key))]
    # A label that is no boolean is a class of the text.
    labels = [key for key in LABEL_KEYS if isinstance(record.get(key), bool)]
    if not found and not labels:
        return record
    keys = " and ".join(f'"{key}"' for key in (*found, *labels))
    if not take_chosen:
        explanation = f"found {keys}: preference data, whose rejected answers are not to be learnt"
        raise BadRecord("preference data", explanation, REMEDY)
    if any(record[key] is False for key in labels):
        bad(REJECTED, f"found {keys}; the answer is labelled bad")
    rest = {key: value for key, value in record.items() if key not in PREFERENCE_KEYS}
    chosen = next((record[key] for key in CHOSEN_KEYS if is_filled(record.get(key))), None)
    return rest if chosen is None else _with_answer(rest, chosen, keys)


def _with_answer(rest: dict[str, Any], chosen: Any, keys: str) -> dict[str, Any]:
    """Return the rest of a record with the chosen answer, or with the whole chosen dialogue."""
    marked = marked_turns(chosen) if isinstance(chosen, str) else None
    if marked:
        return {**rest, "conversations": marked}
    question = next((key for key in QUESTIONS if is_filled(rest.get(key))), None)
    listed = any(isinstance(rest.get(key), list) for key in ("conversations", "messages"))
    is_dialogue = isinstance(chosen, list) and bool(chosen) and is_turn(chosen[0])
    if is_dialogue and not listed and (len(chosen) > 1 or question is None):
        others = {key: value for key, value in rest.items() if key != question}
        return {**others, "messages": chosen}
    for key in ("conversations", "messages"):
        if isinstance(rest.get(key), list):
            answer = chosen if isinstance(chosen, list) else [chosen]
            names = ("from", "value") if key == "conversations" else ("role", "content")
            speaker = "gpt" if key == "conversations" else "assistant"
            answer = [
                {names[0]: speaker, names[1]: one} if isinstance(one, str) else one
                for one in answer
            ]
            return {**rest, key: [*rest[key], *answer]}
    if question is None:
        bad("preference data", f"found {keys} without a question; expected a prompt or turns")
    if pair_keys(rest):
        bad("preference data", f"found {keys} beside another answer; expected one of them")
    return {**rest, "output" if question == "instruction" else "completion": chosen}
