"""Base class of errors a user can fix."""


class UserError(Exception):
    """The message states in one line what is wrong, where, and what to do.

    Commands print it without a traceback and exit with `status`.
    """

    status = 1
