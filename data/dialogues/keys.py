"""Which keys of a record are used, carry no meaning for training, or are lost."""

from collections.abc import Iterator
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


def _filled(holder: Any, used: set[str]) -> Iterator[str]:
    if isinstance(holder, dict) and not holder.keys() <= used:
        for key, value in holder.items():
            if key not in used and value not in (None, "", [], {}):
                yield str(key)
