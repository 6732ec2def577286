"""Messages of a chat's channels, and who has written them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Post:
    """A message of a channel.

    at: seconds since 1970. thread: its key, empty outside of threads. speaker: an id. left_out:
    causes to count; `text` is empty for a message that is left out whole.
    """

    channel: str
    thread: str
    at: float
    speaker: str
    text: str
    left_out: tuple[str, ...] = ()


@dataclass
class Speakers:
    """The names of each speaker by id, and the ids of bots."""

    names: dict[str, dict[str, None]] = field(default_factory=dict)
    bots: set[str] = field(default_factory=set)

    def add(self, speaker: str, names: Iterable[Any], bot: bool, first: bool = False) -> None:
        """Add names of a speaker; the first of all is shown. first: before those that are known."""
        known, new = self.names.get(speaker, {}), {str(name): None for name in names if name}
        self.names[speaker] = new | known if first else known | new
        if bot:
            self.bots.add(speaker)

    def name(self, speaker: str) -> str:
        """Return the first name of a speaker, or the id."""
        return next(iter(self.names.get(speaker, ())), speaker)

    def found(self, name: str) -> set[str]:
        """Return the ids of the speakers that have this id or name; case is ignored."""
        wanted = name.removeprefix("@").casefold()
        return {
            speaker
            for speaker, names in self.names.items()
            if wanted in (speaker.casefold(), *(one.casefold() for one in names))
        }


def attached(message: dict[str, Any], names: dict[str, str]) -> tuple[str, ...]:
    """Return a cause for each file of a message, and for its reactions."""
    found = [name for key, name in names.items() for _ in message.get(key) or ()]
    found += ["reaction"] * len(message.get("reactions") or ())
    return tuple(f"{name} left out" for name in found)
