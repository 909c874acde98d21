"""Base class of errors a user can fix, and descriptions of other errors."""

# Maximum length of a line, and of the message of another error in it.
_MAX_LINE, _MAX_MESSAGE = 800, 200


class UserError(Exception):
    """The message states in one line what is wrong, where, and what to do.

    Commands print it without a traceback and exit with `status`. Names and values in it may come
    from damaged files: characters that do not print are escaped, and a long message is shortened in
    the middle.
    """

    status = 1

    def __init__(self, message: str):
        super().__init__(_shortened(printable(message), _MAX_LINE))


class Interrupted(UserError):
    """A run that was stopped after a checkpoint."""

    # EX_TEMPFAIL: the same command resumes the run.
    status = 75


def one_line(error: BaseException) -> str:
    """Type and message of an exception, shortened, for a line that says what it means."""
    message = _shortened(printable(" ".join(str(error).split())), _MAX_MESSAGE)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def printable(text: str) -> str:
    """Escapes characters that do not print, e.g. a newline in the name of a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shortened(text: str, length: int) -> str:
    """Leaves out the middle: the end of a message says what to do."""
    if len(text) <= length:
        return text
    return f"{text[: length * 2 // 3]} ... {text[-(length // 3 - 5) :]}"
