"""A dialogue in memory: turns with reasoning, tool calls and tool results, and the tools."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool by the assistant; `arguments` are an object or JSON text, as given."""

    name: str
    arguments: Any
    id: str | None = None


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue; an assistant turn is trained if it is `supervised`.

    reasoning, calls: of an assistant turn. name, call_id: of a tool turn, the tool and the call
    whose result it is.
    """

    role: Role
    text: str
    supervised: bool = True
    reasoning: str | None = None
    calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None

    @property
    def content(self) -> list[Any]:
        """Return what the turn says, as JSON values; a plain turn's are its role and text."""
        calls = [[call.id, call.name, call.arguments] for call in self.calls]
        more = [self.reasoning, calls or None, self.name, self.call_id]
        return [self.role, self.text, *(more if any(more) else ())]


@dataclass(frozen=True)
class Dialogue:
    """The turns of a dialogue, a user turn first.

    id: of the record, or its index in the file. system: text of a leading system turn; it replaces
    the template's own. tools: the definitions of the tools. template_arguments: arguments of the
    chat template that the record gives. place: file and record, for error messages.
    """

    id: str
    turns: tuple[Turn, ...]
    system: str | None = None
    tools: tuple[dict[str, Any], ...] = ()
    template_arguments: dict[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def share(self) -> float:
        """A number in [0, 1) that depends only on the content."""
        system = [] if self.system is None else [["system", self.system]]
        tools = [["tools", json.dumps(self.tools)]] if self.tools else []
        return share_of([*system, *tools, *(turn.content for turn in self.turns)])


def share_of(content: Sequence[Sequence[Any]]) -> float:
    """Return a number in [0, 1) that depends on roles and texts; it decides what is held out."""
    digest = hashlib.sha256(json.dumps(content).encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64
