"""Follows folders: updates an index soon after their files change.

A look lists a folder and compares it with what the last update saw. What the system notices says
only when to look: it loses changes where a queue is full, a disk is mounted or another machine
writes.
"""

import atexit
import contextlib
import importlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

from drl_jax.runtime.errors import Unavailable, UserError
from drl_jax.search.index_file import part_directories, read_header
from drl_jax.search.reading import find_videos
from drl_jax.search.session import Index
from drl_jax.search.transcripts import find_transcripts
from drl_jax.search.update import IndexReport

# Milliseconds between looks, at least: a file that two looks find alike is not being written.
_BETWEEN = 1000
# Seconds between looks without a notice, and until a failed update is tried again.
_LOOKED_EVERY = 30.0
# Looks take at most one of so many seconds.
_SHARE = 5
# What an update could not read is different from any file.
_UNREAD = (-1, -1)

# Updates an index to a folder, or only to some paths in it.
UpdateFolder = Callable[[Path, Sequence[str]], IndexReport]
# Gets what happens.
Say = Callable[[str | UserError], object]


def tell(line: str | UserError) -> None:
    """Prints what happens on stderr: the answers alone are on stdout."""
    line = f"drl_jax.search: {line}" if isinstance(line, UserError) else line
    print(line, file=sys.stderr, flush=True)


def follow(
    update: UpdateFolder,
    folders: Sequence[Path],
    stop: threading.Event,
    say: Say = tell,
) -> None:
    """Updates an index to folders, and again when their files change, until `stop` is set.

    A file is read when it has stayed the same for a second. An update that fails is tried again.

    Args:
      update: e.g. `update_index`; the paths are `only`, and none means the whole folder.
      folders: of the index.
      stop: ends the following, not an update.
      say: gets the report of an update that has changed something, and why one fails, unless it
        fails as the one before.

    Raises UserError if watchfiles is not installed.
    """
    watchfiles()
    followed = [_Folder(folder, update, say) for folder in folders]
    next_timed = earliest = -math.inf
    is_due = False
    while not stop.is_set():
        for is_noticed in _notices(folders, stop):
            now = time.monotonic()
            is_timed, is_due = now >= next_timed, is_due or is_noticed
            is_due |= any(one.waits for one in followed)
            if now < earliest or not (is_timed or is_due):
                continue
            if is_timed:
                next_timed = now + _LOOKED_EVERY
            changed = sum(one.look(is_timed=is_timed) for one in followed)
            earliest = now + _SHARE * sum(one.seconds for one in followed)
            if changed and not is_due:
                break  # Nothing was noticed, e.g. where another disk is mounted: watch anew.
            is_due = False


def watchfiles() -> ModuleType:
    """The library; raises a UserError if it is not installed."""
    try:
        return importlib.import_module("watchfiles")
    except ImportError as error:
        line = "--watch needs watchfiles: pip install 'drl_jax[watch]'"
        raise UserError(line) from error


def _notices(folders: Sequence[Path], stop: threading.Event) -> Iterator[bool]:
    """Whether the system noticed a change: at once, and then every second until `stop` is set."""
    yield False
    changes = watchfiles().watch(
        *folders,
        watch_filter=None,
        debounce=5 * _BETWEEN,
        step=_BETWEEN // 2,  # It waits for two of them.
        rust_timeout=_BETWEEN,
        yield_on_timeout=True,
        stop_event=stop,
        ignore_permission_denied=True,
    )
    try:
        for number, noticed in enumerate(changes):
            yield number == 0 or bool(noticed)  # What changed before it watched is not noticed.
    # There is no such folder now, or it has more folders than the system watches.
    except (OSError, RuntimeError):
        end = time.monotonic() + _LOOKED_EVERY
        while time.monotonic() < end and not stop.wait(_BETWEEN / 1000):
            yield False


class _Folder:
    """A folder that is followed. `waits`: a file may still be written; `seconds` of the last look.

    Files are compared by sizes and modification times, with the transcripts beside them.
    """

    def __init__(self, folder: Path, update: UpdateFolder, say: Say):
        self._folder, self._update, self._say = folder, update, say
        self.waits, self.seconds, self._failure, self._said = False, 0.0, "", ""
        # As of the last update, by path; None: not known, and all files are compared.
        self._seen: dict[str, tuple] | None = None
        self._listed: dict[str, tuple] = {}
        self._unread: set[str] = set()

    def look(self, *, is_timed: bool) -> bool:
        """Updates the index to what has changed and settled; whether something has changed."""
        start, self.waits = time.monotonic(), False
        try:
            found = self._list()
            self.seconds = time.monotonic() - start
            changed, settled = self._compare(found, is_timed)
            if settled is not None:
                self._run(found, settled)
            self._failure = "" if self._seen is not None else self._failure
            return changed
        except (UserError, OSError) as error:
            if isinstance(error, FileNotFoundError) and self._folder.is_dir():
                self.waits = True  # Something in it is gone since it was listed.
                return True
            line = Unavailable(self._folder, error) if isinstance(error, OSError) else error
            if str(line) != self._failure:
                self._say(line)
            self._failure = str(line)
            return False

    def _list(self) -> dict[str, tuple]:
        """By the paths of videos: what tells whether they, or transcripts beside them, change."""
        videos = find_videos(self._folder, 0.0, {}, {})
        found: dict[str, tuple] = {file.path: (file.size, file.mtime_ns) for file in videos}
        for one in find_transcripts(self._folder, found):
            found[one.video] += one[1:4]
        return found

    def _compare(self, found: dict[str, tuple], is_timed: bool) -> tuple[bool, list[str] | None]:
        """Whether files have changed, and which to update: [] is all of them, None is no update."""
        before, self._listed = self._listed, found
        if self._seen is None:
            return False, [] if is_timed else None
        if self._seen and not found:
            raise UserError(f"no video is left in {self._folder}: is it mounted? None is removed")
        if is_timed:
            self._seen |= dict.fromkeys(self._unread, _UNREAD)
            self._unread.clear()
        seen, paths = self._seen, found.keys() | self._seen.keys()
        changed = [path for path in paths if found.get(path) != seen.get(path)]
        settled = [path for path in changed if found.get(path) == before.get(path)]
        self.waits = len(settled) < len(changed)
        if 2 * len(settled) > len(seen):
            # A moved folder; or most files are gone, which such an update refuses.
            return True, []
        return bool(changed), settled or None

    def _run(self, found: dict[str, tuple], only: list[str]) -> None:
        seen, self._seen = self._seen, None
        try:
            report = self._update(self._folder, only)
        except (UserError, OSError):
            if not only:
                raise
            only = []  # E.g. one of the files is gone again.
            report = self._update(self._folder, only)
        if only:
            now = {path: found[path] for path in only if path in found}
            self._seen = {p: of for p, of in seen.items() if p not in {*only}} | now
        else:
            self._seen = found
        self._unread |= report.unavailable.keys() & found.keys()
        if report.has_changed and (line := f"{self._folder}: {report}") != self._said:
            self._said = line  # Once, that a file cannot be read.
            self._say(line)


@contextlib.contextmanager
def updating(index: Index, folders: Sequence[Path], *, follows: bool) -> Iterator[threading.Thread]:
    """Updates an index to folders in a thread, which prints what it does, in the block.

    The process ends with status 0 if it does so in an update, of which the next one does the rest.

    Args:
      follows: whether to follow the folders until the end of the block.

    Yields the thread, which ends early if it does not follow.
    """
    stop = threading.Event()

    def update(folder: Path, only: Sequence[str]) -> IndexReport:
        return index.add([folder / path for path in only] or folder)

    def update_once() -> None:
        for folder in folders:
            try:
                tell(f"{folder}: {index.add(folder, progress=True)}")
            except UserError as error:
                tell(error)

    if follows:
        watchfiles()
    target, arguments = (follow, (update, folders, stop)) if follows else (update_once, ())
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        stop.set()
        thread.join(2.0)
        if thread.is_alive():
            tell("")  # Behind its bar.
            # XLA may crash at the end of Python with what is left unfinished.
            atexit.register(os._exit, 0)
            atexit.register(sys.stdout.flush)


def folders_of(index: Index) -> list[Path]:
    """The folders of an index, each of one of its parts."""
    return [Path(read_header(part)["videos"]) for part in part_directories(index.directory)]
