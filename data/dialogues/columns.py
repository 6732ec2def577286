"""Reads the flags --columns and --roles, and records by named columns."""

from collections.abc import Mapping, Sequence
from typing import Any

from data.dialogues.conversation import Role
from data.dialogues.pairs import history_turns, side_turns
from data.dialogues.tools import TOOL_KEYS, tools_of
from data.dialogues.turns import ROLES
from data.errors import BadRecord, UserError

PARTS = ("user", "assistant", "system", "id")


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """Return the column of each part; words: such as user=question. Raises UserError."""
    pairs = [(part, name) for part, _, name in (word.partition("=") for word in words)]
    parts = [part for part, _ in pairs]
    wrong = len({*parts}) < len(parts) or not {*parts} <= {*PARTS} or not all(n for _, n in pairs)
    if wrong or not {"user", "assistant"} <= {*parts}:
        found = " ".join(words) or "nothing"
        raise UserError(
            f"--columns: found {found}; expected user=NAME assistant=NAME, and optionally "
            "system=NAME and id=NAME."
        )
    return dict(pairs)


def parse_roles(words: Sequence[str]) -> dict[str, Role]:
    """Return the role of each name; words: such as user=human,Human. Raises UserError."""
    roles: dict[str, Role] = {}
    for word in words:
        role, _, names = word.partition("=")
        known = ROLES.get(role)
        if known is None or role not in ("user", "assistant", "system", "tool") or not names:
            raise UserError(
                f"--roles: found {word}; expected user=NAME,... or assistant=, system= or tool=."
            )
        roles |= dict.fromkeys(filter(None, names.split(",")), known)
    return roles


def from_columns(
    row: dict[str, Any], columns: Mapping[str, str], roles: Mapping[str, Role] | None = None
) -> dict[str, Any]:
    """Return the named columns of a row, its history and its tools as ShareGPT.

    Raises BadRecord.
    """
    missing = [name for name in columns.values() if name not in row]
    if missing:
        explanation = f"found the columns {', '.join(map(str, row))}"[:200]
        raise BadRecord("no such column", f"{explanation}; expected {', '.join(missing)}")
    turns = []
    for part, speaker in (("system", "system"), ("user", "human"), ("assistant", "gpt")):
        if part == "system" and not row.get(columns.get(part, "")):
            continue
        if part == "user" and "history" not in columns.values():
            turns += history_turns(row.get("history"), roles)
        turns += side_turns(row, columns[part], speaker, roles)
    given = row[columns["id"]] if "id" in columns else None
    identity = {} if given in (None, "") else {"id": str(given)}
    read = (*columns.values(), "id", "history", *TOOL_KEYS)
    others = {key: row[key] for key in row if key not in read}
    return {**identity, **others, "conversations": turns, **tools_of(row)}
