"""Errors that end a run with one message and an exit code, without a traceback."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An error in flags, files or data that the user corrects: exit code 2.

    known_to_all: all ranks raise this error, so no rank waits for another.
    """

    exit_code = 2
    known_to_all = False


class RunError(UserError):
    """A failure outside of the run, such as a full disk: exit code 1."""

    exit_code = 1


class Stopped(UserError):
    """The run stopped on request and can be resumed: exit code 75."""

    exit_code = 75


@contextmanager
def collect_errors(errors: list[str] | None) -> Iterator[None]:
    """Add the block's UserError to the list, which `doctor` prints; raise without a list."""
    try:
        yield
    except UserError as error:
        if errors is None:
            raise
        add_errors([str(error)], errors)


def add_errors(found: Iterable[str], errors: list[str] | None) -> None:
    """Add each error to the list once; without a list raise UserError for the first."""
    for error in found:
        if errors is None:
            raise UserError(error)
        if error not in errors:
            errors.append(error)


class BadRecord(Exception):
    """A record that cannot be used: a cause to count, and what was found and expected."""

    def __init__(self, cause: str, explanation: str) -> None:
        super().__init__(
            cause, explanation
        )  # both: unpickling in another process calls __init__ with them
        self.cause = cause

    def __str__(self) -> str:
        return str(self.args[1])
