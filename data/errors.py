"""The ends of a run that are told in one message, without traceback."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in flags, files or data, the user's to mend: exit code 2.

    `known_to_all`: every rank raises this very one, so that none of them is left waiting.
    """

    exit_code = 2
    known_to_all = False


class RunError(UserError):
    """What befell the run from outside, a full disk for one: exit code 1."""

    exit_code = 1


class Stopped(UserError):
    """The run was asked to stop and can go on from where it is: exit code 75."""

    exit_code = 75


@contextmanager
def collect_errors(errors: list[str] | None) -> Iterator[None]:
    """Add the block's mistake to the list, for `doctor`, which tells all; without a list: raise."""
    try:
        yield
    except UserError as error:
        if errors is None:
            raise
        add_errors([str(error)], errors)


def add_errors(found: Iterable[str], errors: list[str] | None) -> None:
    """Add the mistakes to the list, each once; without a list raise UserError for the first."""
    for mistake in found:
        if errors is None:
            raise UserError(mistake)
        if mistake not in errors:
            errors.append(mistake)


class BadRecord(Exception):
    """A record that cannot be used: a countable cause, and what was found and expected."""

    def __init__(self, cause: str, explanation: str) -> None:
        super().__init__(cause, explanation)  # both, or it could not go to another process
        self.cause = cause

    def __str__(self) -> str:
        return str(self.args[1])
