"""Locks on directories, which end with the process that holds them."""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import naming

# Name of a directory's lock file.
LOCK_FILE = ".lock"
# Start of the names of temporary directories.
_TEMPORARY = "drl_jax_temporary_"
# Errors of a file system without locks.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


class LockError(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which names its holder, while the block runs.

    The kernel releases the lock when the process ends, also when it is killed. The file stays: if
    it were deleted, one process could lock the deleted file and another one a new file.

    On NFS the lock holds between hosts (Linux 2.6.12 or later, with locking on the server). On a
    file system without locks, a warning on stderr says so, and the block runs unprotected.

    Raises:
      LockError: another process uses `what`, e.g. "the dataset in data/msvd".
      OSError: the file, or a parent of it, cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not truncated, so that a process that does not get the lock can read who has it. Not
    # inherited: a child that outlives this process would keep the lock.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with naming(path):
            _acquire(descriptor, path, what)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Over NFS the lock is one of fcntl, for which a held lock can be EACCES.
    except (BlockingIOError, PermissionError) as error:
        # The file is empty for a moment after it was locked.
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
        host, _, process = holder.strip().rpartition(" ")
        who = f"process {process} on host {host}" if host else "another process"
        raise LockError(f"{what} is in use by {who}; wait for it to end, or stop it") from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        print(
            f"warning: {path} cannot be locked ({error.strerror}); nothing prevents a second"
            f" process from writing to {path.parent}",
            file=sys.stderr,
        )
        return
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode(), 0)


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file; False where that cannot be known.

    A process that asks for the lock at the same moment may not get it: ask only with a reason to
    believe that it is held.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in _UNSUPPORTED
    return False


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory for temporary files, which is deleted when the block ends.

    Those that processes left behind when they were killed are deleted first: the kernel has
    released their locks. On a file system without locks, they stay.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            descriptor = _hold(left, fcntl.LOCK_EX)
            shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
    with contextlib.ExitStack() as at_end:
        while True:
            directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
            try:
                at_end.callback(os.close, _hold(directory, fcntl.LOCK_SH))
            except (BlockingIOError, FileNotFoundError):
                continue  # Another process came first, and deletes it.
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            break
        at_end.callback(shutil.rmtree, directory, ignore_errors=True)
        yield directory


def _hold(directory: Path, kind: int) -> int:
    """Locks a directory itself, and returns the descriptor that holds the lock."""
    descriptor = os.open(directory, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        directory.stat()  # It may have been deleted before it was locked.
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
