"""The base of every error that a user can mend."""


class UserError(Exception):
    """What is wrong, where, and what to do, in one line; entry points print it and exit with 1."""
