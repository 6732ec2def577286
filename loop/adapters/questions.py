"""Reads a file of questions for `python -m loop chat --prompts`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError


@dataclass(frozen=True)
class Asked:
    """One question of a file."""

    id: Any
    text: str
    system: str | None


def read_prompts(file: Path) -> list[Asked]:
    """Return a file's questions; raises UserError for a line that is none, by its number."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts {file}: cannot be read: {reason}.") from None
    found = [_asked(line, number, file) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"--prompts {file}: it is empty; expected a question a line.")
    return found


def _asked(line: str, number: int, file: Path) -> Asked:
    if file.suffix != ".jsonl":
        return Asked(number, line, None)
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"--prompts {file}: line {number}: not valid JSON: {error}.") from None
    known = value if isinstance(value, dict) else {}
    text, system = known.get("prompt"), known.get("system")
    if not isinstance(text, str) or not text.strip() or not isinstance(system, str | None):
        raise UserError(
            f"--prompts {file}: line {number}: found {line[:80]}; expected an object with a text "
            'as "prompt", and perhaps as "system".'
        )
    return Asked(known.get("id", number), text, system)
