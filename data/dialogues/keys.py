"""Which keys of a record are used, carry no meaning for training, or are lost."""

import inspect
from collections.abc import Iterable, Iterator, Set
from functools import cache
from typing import Any

from data.dialogues.tools import TOOL_KEYS
from data.dialogues.turns import ALL_MARKS, REASONING_KEYS, ROLE_KEYS, SYSTEM_KEYS, TEXT_KEYS

# Read in every form.
USED = {"id", "chat_template_kwargs", *SYSTEM_KEYS, *TOOL_KEYS, *ALL_MARKS}
USED_IN_TURNS = {
    *("name", "tool_call_id", "tool_calls", "function_call"),
    *(*ROLE_KEYS, *TEXT_KEYS, *REASONING_KEYS, *ALL_MARKS),
}
# What these hold changes what the model should learn, and is not used.
MEANINGFUL = {
    *("image", "images", "audio", "audios", "video", "videos", "documents"),
    *("chosen", "rejected", "label", "labels", "preference", "margin"),
    *("choices", "options", "prefix", "refusal", "suffix"),
}


def unused_keys(record: Any, used: frozenset[str]) -> Iterator[str]:
    """Yield the keys of a record and of its turns that hold something and are not used.

    used: the keys that the record's form reads.
    """
    if not isinstance(record, dict):
        return
    yield from _filled(record, _used(used))
    for name in ("conversations", "messages"):
        turns = record.get(name)
        if isinstance(turns, list):
            found = {key for turn in turns for key in _filled(turn, USED_IN_TURNS)}
            yield from (f"{name}.{key}" for key in found)


@cache
def _used(used: frozenset[str]) -> frozenset[str]:
    return used | USED


def is_meaningful(key: str) -> bool:
    """Return whether an unused key changes what the model should learn."""
    return key.rpartition(".")[2] in MEANINGFUL


def reserved_names(arguments: Iterable[str]) -> list[str]:
    """Return those of the names that cannot be arguments of a chat template, sorted."""
    given = {*arguments}
    return sorted(given & _reserved()) if given else []


@cache
def _reserved() -> frozenset[str]:
    """Return what `apply_chat_template` takes itself, or passes to every template.

    `documents` is allowed: templates for retrieval read it, and nothing else gives it.
    """
    from transformers import PreTrainedTokenizerBase  # slow, and most data has no arguments
    from transformers.utils.chat_template_utils import render_jinja_template

    taken = {"messages", *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        taken |= {*inspect.signature(function).parameters}
    return frozenset(taken - {"kwargs", "documents"})


def _filled(holder: Any, used: Set[str]) -> Iterator[str]:
    if isinstance(holder, dict) and not holder.keys() <= used:
        for key, value in holder.items():
            if key not in used and value not in (None, "", [], {}):
                yield str(key)
