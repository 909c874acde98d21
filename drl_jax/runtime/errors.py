"""Base class of errors a user can fix, and descriptions of other errors."""

# Maximum length of an error's message in a line.
_MAX_MESSAGE = 200


class UserError(Exception):
    """The message states in one line what is wrong, where, and what to do.

    Commands print it without a traceback and exit with `status`.
    """

    status = 1

def one_line(error: Exception) -> str:
    """Type and message of an exception, shortened, for a line that says what it means."""
    message = " ".join(str(error).split())
    if len(message) > _MAX_MESSAGE:
        message = message[: _MAX_MESSAGE - 3] + "..."
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
