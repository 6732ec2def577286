"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in flags, files or data: printed as one message without traceback, exit code 2.

    `known_to_all`: every rank raises this very one, so that none of them is left waiting.
    """

    known_to_all = False
