"""Which keys of a record are used, carry no meaning for training, or are lost."""

import inspect
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

# Read by formats.py and sharegpt.py.
USED = {
    *("id", "conversations", "messages", "system", "tools", "functions", "chat_template_kwargs"),
    *("instruction", "input", "output", "history"),
}
USED_IN_TURNS = {
    *("from", "value", "role", "content", "train", "weight", "name", "tool_call_id"),
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
}
# What these hold changes what the model should learn, and is not used.
MEANINGFUL = {
    *("image", "images", "audio", "audios", "video", "videos", "documents"),
    *("chosen", "rejected", "label", "labels", "preference", "margin"),
    *("loss", "loss_mask", "loss_scale", "loss_weight", "mask", "training"),
    *("system_prompt", "prefix", "refusal", "suffix"),
}


def unused_keys(record: Any) -> Iterator[str]:
    """Yield the keys of a record and of its turns that hold something and are not used."""
    if not isinstance(record, dict):
        return
    yield from _filled(record, USED)
    for name in ("conversations", "messages"):
        turns = record.get(name)
        if isinstance(turns, list):
            found = {key for turn in turns for key in _filled(turn, USED_IN_TURNS)}
            yield from (f"{name}.{key}" for key in found)


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


def _filled(holder: Any, used: set[str]) -> Iterator[str]:
    if isinstance(holder, dict) and not holder.keys() <= used:
        for key, value in holder.items():
            if key not in used and value not in (None, "", [], {}):
                yield str(key)
