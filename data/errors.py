"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in flags, files or data: printed as one message without traceback, exit code 2."""
