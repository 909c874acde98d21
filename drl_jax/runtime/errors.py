"""Errors a user can fix, and the one classification of failures of files.

A file is *damaged* if its contents contradict their checksums or format: it can be set aside. It is
*unavailable* if the operating system or a lock refused access: nothing is known about its contents,
so nothing is moved, replaced or deleted. It is *foreign* if it is valid and belongs to another run,
model, dataset or version.
"""

import errno
import numbers
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What damaged contents cause: a part that was written, e.g. a file of a checkpoint, is no longer
# there, or an offset is impossible. All other errors of the operating system say nothing about
# contents.
_OF_CONTENTS = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EINVAL}
)
# Refusals that libraries report as text.
_REPORTED = {
    os.strerror(number): number
    for number in (
        *(errno.EACCES, errno.EBUSY, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE),
        *(errno.ELOOP, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EPERM, errno.EROFS),
        *(errno.ESTALE, errno.ETIMEDOUT),
    )
}


class UserError(Exception):
    """The message states in one line what is wrong, where, and what to do.

    Commands print it without a traceback and exit with `status`. Names and values in it may come
    from damaged files: characters that do not print are escaped, and a long message is shortened in
    the middle.
    """

    status = 1

    def __init__(self, message: str):
        super().__init__(_shortened(printable(message), 800))


class ClusterError(UserError):
    """A cluster cannot be reached, or a node of it cannot do the work."""


class Interrupted(UserError):
    """A run that was stopped after a checkpoint."""

    status = 75  # EX_TEMPFAIL: the same command resumes the run.


class Notice(UserWarning):
    """Something that a user should know, in one line; commands print it as they print an error."""


class Unavailable(UserError):
    """The operating system refused to read or write something, which may be intact.

    The message names the path in `error`, or else `what`, and the refused `action`.
    """

    def __init__(self, what: str | Path, error: OSError, action: str = "read"):
        name = errno.errorcode.get(error.errno, str(error.errno))
        # Errors of libraries have a message alone, which `str` drops beside a filename.
        reason = f"{error.strerror} ({name})" if error.errno else " ".join(map(str, error.args))
        message = f"{error.filename or what} cannot be {action}: {reason}"
        if error.errno not in _OF_CONTENTS:
            message += "; nothing was moved or deleted, try again when the cause is removed"
        super().__init__(message)


def as_path(value: Any, what: str) -> Path:
    """A path that a user gave; UserError if it is none."""
    # `__fspath__` of a user's own class may raise anything.
    try:
        path = os.fspath(value)
    except Exception:
        path = b""
    if not isinstance(path, str):
        raise UserError(f"{what} is a path, not {type(value).__name__}")
    if not path or "\0" in path:
        raise UserError(f"{what}: {path!r} is no path" if path else f"{what}: the path is empty")
    return Path(path)


def check_count(value: Any, what: str) -> None:
    """Raises a UserError if a number that a user gave is not whole and positive."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what} is a positive whole number, not {value!r}")


def system_errors(error: BaseException) -> Iterator[OSError]:
    """Yields the errors of the operating system, with their numbers, that an exception reports.

    Looks at the exception and its causes, and at the texts in which TensorStore, array_record and
    TensorFlow report errors of files.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    for link in chain:
        number, text = 0, str(link)
        if isinstance(link, OSError):
            number = link.errno or (errno.ETIMEDOUT if isinstance(link, TimeoutError) else 0)
        elif isinstance(link, MemoryError):
            number = errno.ENOMEM
        elif code := re.search(r"\[os_error_code='(\d+)'\]", text):
            number = int(code[1])
        elif isinstance(link, RuntimeError) or type(link).__module__.startswith("tensorflow."):
            number = next((n for reason, n in _REPORTED.items() if reason in text), 0)
        if number:
            reason = getattr(link, "strerror", None) or os.strerror(number)
            yield OSError(number, reason, getattr(link, "filename", None))


def refusal(error: BaseException) -> OSError | None:
    """The operating system's refusal that an exception reports; None if contents are wrong.

    An absent file is no refusal.
    """
    return next((e for e in system_errors(error) if e.errno not in _OF_CONTENTS), None)


def raise_if_refused(what: str | Path, error: BaseException, action: str = "read") -> None:
    """Raises Unavailable if `error` reports a refusal; call it before it is taken for damage."""
    if (refused := refusal(error)) is not None:
        raise Unavailable(what, refused, action) from error


def one_line(error: BaseException) -> str:
    """Type and message of an exception, shortened, for a line that says what it means."""
    message = _shortened(printable(" ".join(str(error).split())), 200)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def printable(text: str) -> str:
    """Escapes characters that do not print, e.g. a newline in the name of a file."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shortened(text: str, length: int) -> str:
    """Leaves out the middle: the end of a message says what to do."""
    if len(text) <= length:
        return text
    return f"{text[: length * 2 // 3]} ... {text[-(length // 3 - 5) :]}"
