"""Errors that end a run with one message and an exit code, without a traceback."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error in flags, files or data that the user can correct: exit code 2.

    known_to_all: whether all ranks raise this error, so that no rank waits for another.
    """

    exit_code = 2
    known_to_all = False


class RunError(UserError):
    """A failure during the run, such as a full disk: exit code 1."""

    exit_code = 1


class Stopped(UserError):
    """The run stopped on request and can be resumed: exit code 75."""

    exit_code = 75


@contextmanager
def collect_errors(errors: list[str] | None) -> Iterator[None]:
    """Catch a UserError of the block and add it to the list; without a list, raise it.

    `doctor` prints the list.
    """
    try:
        yield
    except UserError as error:
        if errors is None:
            raise
        add_errors([str(error)], errors)


def add_errors(found: Iterable[str], errors: list[str] | None) -> None:
    """Add each error to the list once; without a list, raise UserError for the first error."""
    for error in found:
        if errors is None:
            raise UserError(error)
        if error not in errors:
            errors.append(error)


class BadRecord(Exception):
    """A record that cannot be used.

    cause: short, to count records by it. explanation: what was found and what is expected.
    remedy: the flag or command that reads the record, in which {file} is the name of the file.
    """

    def __init__(self, cause: str, explanation: str, remedy: str = "") -> None:
        # `args` must be all arguments: unpickling in another process calls __init__ with `args`.
        super().__init__(cause, explanation, remedy)
        self.cause, self.remedy = cause, remedy

    def __str__(self) -> str:
        return str(self.args[1])


def printable(text: str) -> str:
    """Return the text with line breaks, and other characters that a terminal obeys, escaped.

    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )
