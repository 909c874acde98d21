"""An index: one sealed file, `index.json`, that lists immutable segments.

The file says what the index was made with, which segments it has, and which of their videos are
gone. An update writes new segments and then replaces the file, which is the commit: a writer that
is killed leaves segments that nothing lists, and the next one deletes them. Other indexes may be
listed, too, or instead: parts, which are updated on their own. The videos of a second folder are
such a part.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.runtime.errors import Unavailable, one_line, raise_if_refused, refusal
from drl_jax.runtime.files import seal, unseal, write_json
from drl_jax.runtime.lock import is_locked, locked
from drl_jax.search.segments import Listed, SearchIndexError, Segment, VideoRecord, write_segment

FORMAT = 9
LOCK = "lock"
_INDEX, _SEGMENTS, _DAMAGED, _SPOOL = "index.json", "segments", "damaged_segments", "spool"
_PARTS = "parts"
# Fields of the header in which updates, and those in which parts must agree; names in messages.
MADE_WITH = {
    "fingerprint": "model",
    "videos": "folder",
    "storage": "storage",
    "encoder": "encoder",
    "fps": "fps",
    "shard": "shard",
    "bank": "captions of weak matches (the dataset of the model is at hand for one of them only)",
    "hubness": "bank",
}
_SHARED = ("fingerprint", "storage", "encoder", "fps", "bank", "hubness")
# As many segments of one size are merged; sizes grow by this factor. An update of single files
# merges at most _LIGHT windows and videos. Segments of which a larger share is gone are rewritten.
_MERGED, _SMALLEST, _LIGHT, _MOST_GONE = 16, 64, 16_384, 0.25
_ATTEMPTS = 3
# How far an update is, for the processes that search; no part of the index. Seconds between writes.
_PROGRESS, _INTERVAL = "indexing.json", 1.0
# What versions 2 to 6 wrote.
_EARLIER = ("index.sqlite", "shards.json")
_MAKE = "python -m drl_jax.search index --workdir=RUN --videos=DIR"


def read_header(directory: Path) -> dict[str, Any]:
    """What `index.json` holds.

    Raises a SearchIndexError if there is no index, it is damaged, or another version made it;
    Unavailable if it cannot be read.
    """
    path = directory / _INDEX
    try:
        header = unseal(path.read_text(encoding="utf-8"))
        version = header["format"]
    except (FileNotFoundError, NotADirectoryError) as error:
        line = f"there is no index in {directory}; make it with drl_jax.Index(directory,"
        line += f" model).add(videos), or: {_MAKE} --index={directory}"
        if _is_earlier(directory):
            line = f"the index {directory} was made by an earlier version"
            line += f"; make it anew with: {_MAKE} --index=NEW"
        raise SearchIndexError(line) from error
    except OSError as error:
        raise Unavailable(path, error) from error
    except (ValueError, KeyError) as error:
        raise SearchIndexError(
            f"{path} is damaged ({one_line(error)}); index the videos into another directory, or"
            " restore this file"
        ) from error
    if version != FORMAT:
        raise SearchIndexError(
            f"the index {directory} has format {version}, and this version reads {FORMAT}; use the"
            f" version that made it, or make it anew with: {_MAKE} --index=NEW"
        )
    return {"encoder": "jax", **header}  # The only one, before it was recorded.


def has_index(directory: Path) -> bool:
    """Whether a directory is an index, maybe of an earlier version."""
    return (directory / _INDEX).exists() or _is_earlier(directory)


def recorded_encoder(directory: Path) -> str | None:
    """What encoded the frames of an index; None: there is no index."""
    if not has_index(directory):
        return None
    return read_header(part_directories(directory)[0])["encoder"]


def _is_earlier(directory: Path) -> bool:
    return any((directory / name).exists() for name in _EARLIER)


def part_directories(directory: Path) -> list[Path]:
    """The directories of the parts of an index: its own, if it has videos, and others it lists."""
    header, here = read_header(directory), directory.resolve()
    others = [Path(os.path.normpath(here / part)) for part in header.get("parts", ())]
    return [directory, *others] if "segments" in header else others


def directory_for(directory: Path, folder: Path) -> Path:
    """The part of an index that has the videos of a folder, or will have them.

    Raises a SearchIndexError if a part has a folder around it or inside it, or its shards.
    """
    if not has_index(directory):
        return directory
    parts = {part: read_header(part) for part in part_directories(directory)}
    folders = {part: Path(header["videos"]) for part, header in parts.items()}
    own = [part for part, other in folders.items() if other == folder]
    gone = [] if own else [part for part, other in folders.items() if not other.is_dir()]
    if gone and parts.keys() != {directory}:
        gone = [part for part in gone if _has_files_of(part, folder)]
    for part in [*own, *gone][:1]:
        if "shard" in parts[part] and part != directory:
            what = "joins the shards of a folder; index the videos of each on its own"
            raise SearchIndexError(f"{directory} {what}")
        return part
    for other in folders.values():
        if folder.is_relative_to(other) or other.is_relative_to(folder):
            raise SearchIndexError(
                f"{folder} overlaps with {other}, which the index {directory} has: add that folder"
                " again, or give another directory"
            )
    names = (f"{folder}{' ' * number}" for number in itertools.count())
    found = (directory / _PARTS / hashlib.sha256(os.fsencode(n)).hexdigest()[:16] for n in names)
    return next(part for part in found if part not in parts)


def _has_files_of(part: Path, folder: Path) -> bool:
    """Whether most files of a part are in a folder, at their places: that of the part was moved."""
    found = []
    for one in IndexPart(part).listed:
        table = one.segment.table.select(["path", "size"]).take(np.flatnonzero(~one.gone))
        for path, size in zip(*(column.to_pylist() for column in table.columns), strict=True):
            try:
                found.append((folder / path).stat().st_size == size)
            except OSError:
                found.append(False)
    return sum(found) > len(found) / 2


def list_part(directory: Path, part: Path) -> None:
    """Lists another index as a part of an index; raises the errors of `join`."""
    parts = part_directories(directory)
    if part in parts:
        return
    if "segments" not in read_header(directory):
        join(directory, [*parts, part])
        return
    check_alike([IndexPart(directory), IndexPart(part)])
    with IndexWriter(directory) as writer:
        others = writer.header.get("parts", [])
        writer.update_header(parts=[*others, os.path.relpath(part, directory)])


def index_version(directory: Path) -> dict[Path, tuple[int, ...]]:
    """By part of an index, what differs after every commit of it; empty if it is not there."""
    versions: dict[Path, tuple[int, ...]] = dict.fromkeys(part_directories(directory), ())
    for part in versions:
        with contextlib.suppress(OSError):
            status = (part / _INDEX).stat()
            versions[part] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return versions


class IndexPart:
    """A state of an index that is not joined: what it was made with, and its segments."""

    def __init__(self, directory: Path, known: Sequence[Segment] = ()):
        """Opens it, but for `known` segments; raises as `read_header`, and for damaged segments."""
        self.directory = directory
        for _ in range(_ATTEMPTS):
            self.header = read_header(directory)
            self.listed, damaged = _open_segments(directory, self.header, known)
            if not damaged:
                return
            # A merge may have deleted segments since the header was read.
        raise failure(directory, damaged[0][1]) from damaged[0][1]

    def videos(self) -> int:
        """Number of all files."""
        return sum(int((~one.gone).sum()) for one in self.listed)

    def paths(self) -> Iterator[str]:
        """The absolute paths of all files."""
        for one in self.listed:
            paths = one.segment.table.column("path").take(np.flatnonzero(~one.gone)).to_pylist()
            yield from (f"{self.header['videos']}/{path}" for path in paths)

    def windows(self) -> int:
        """Number of windows of all videos."""
        return sum(int(one.segment.column("windows")[one.live].sum()) for one in self.listed)


def _open_segments(
    directory: Path, header: Mapping[str, Any], known: Sequence[Segment] = ()
) -> tuple[list[Listed], list[tuple[dict[str, Any], Exception]]]:
    """The segments of an index; and the entries of those that cannot be opened, with the errors."""
    opened, entries = {segment.directory: segment for segment in known}, header["segments"]

    def open_segment(entry: dict[str, Any]) -> Any:
        """A segment, or the error."""
        path = directory / _SEGMENTS / entry["name"]
        try:
            segment = opened.get(path) or Segment(path.parent, entry)
            segment.check_files()
            return segment
        except (OSError, ValueError) as error:
            return error

    # Most of the time goes into hashes of the tables, which threads compute at once.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        segments = list(pool.map(open_segment, entries))
    listed, damaged = [], []
    for entry, segment in zip(entries, segments, strict=True):
        if isinstance(segment, Exception):
            raise_if_refused(directory, segment)
            damaged.append((entry, segment))
            continue
        gone = np.zeros(len(segment), bool)
        gone[entry["gone"]] = True
        listed.append(Listed(segment, gone))
    return listed, damaged


def failure(directory: Path, error: Exception) -> SearchIndexError | Unavailable:
    """The error of an index of which something is damaged, or cannot be read."""
    if (refused := refusal(error)) is not None:
        return Unavailable(directory, refused)
    return SearchIndexError(
        f"the index {directory} is damaged ({one_line(error)}); index the videos again, and only"
        " the damaged ones are decoded"
    )


class KnownFile(NamedTuple):
    """What an update compares a file with; a merge may have replaced its segment since."""

    segment: Segment
    row: int
    path: str
    size: int
    mtime_ns: int
    sha256: str
    allowed: float


class IndexWriter(IndexPart, contextlib.AbstractContextManager):
    """An index that this process alone writes; a context manager. A new one has no header."""

    def __init__(self, directory: Path):
        """Locks an index and opens it, without damaged segments: their videos are decoded again.

        Raises a LockError if another process writes to it, or as `read_header`.
        """
        self.directory, self.header, self._next_progress = directory, {}, 0.0
        with contextlib.ExitStack() as stack, _writing(directory):
            stack.enter_context(locked(directory / LOCK, f"the index {directory}"))
            if has_index(directory):
                self.header = read_header(directory)
            if self.header and "segments" not in self.header:
                what = "joins other indexes; index their videos, each on its own"
                raise SearchIndexError(f"{directory} {what}")
            (directory / _SEGMENTS).mkdir(exist_ok=True)
            self._open()
            self._stack = stack.pop_all()

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.directory / _SPOOL, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self.directory / _PROGRESS).unlink(missing_ok=True)
        self._stack.close()

    def _open(self) -> None:
        """Opens the segments, and deletes what a killed process left."""
        header = {"segments": [], **self.header}
        names = {entry["name"] for entry in header["segments"]}
        found = list((self.directory / _SEGMENTS).iterdir())
        if not self.header and any(path.suffix != ".part" for path in found):
            raise SearchIndexError(
                f"{self.directory / _INDEX} is missing, and its segments are there; restore this"
                " file, or give another directory"
            )
        for path in found:
            if path.name not in names:
                shutil.rmtree(path)
        shutil.rmtree(self.directory / _SPOOL, ignore_errors=True)
        self.listed, damaged = _open_segments(self.directory, header)
        if damaged:
            self._commit(self.listed)
        aside = self.directory / _DAMAGED
        for entry, error in damaged:
            aside.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                (self.directory / _SEGMENTS / entry["name"]).rename(aside / entry["name"])
            print(
                f"{entry['videos']} videos are indexed again: a segment is damaged"
                f" ({one_line(error)}); what is left of it is in {aside}"
            )

    def update_header(self, **about: Any) -> None:
        """Commits what the index was made with, all of it or changes; makes a new index."""
        self.header = {**self.header, **about}
        self._commit(self.listed)

    def spool_file(self, name: int | str) -> Path:
        """A file that is deleted at the end."""
        with _writing(self.directory):
            (self.directory / _SPOOL).mkdir(exist_ok=True)
        return self.directory / _SPOOL / str(name)

    def show_progress(self, done: int, total: int) -> None:
        """Tells processes that search how many files are read, once a second."""
        if time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + _INTERVAL
            with contextlib.suppress(OSError):  # The update itself reports a full disk.
                write_json(self.directory / _PROGRESS, {"done": done, "total": total})

    def files(self, paths: Sequence[str] | None) -> Iterator[KnownFile]:
        """What is known of all files, or of some; the time for these does not depend on others."""
        for one in self.listed:
            if paths is None:
                rows = np.flatnonzero(~one.gone)
            else:
                found = [row for path in paths if (row := one.segment.find(path)) is not None]
                rows = np.array([row for row in found if not one.gone[row]], np.int64)
            table = one.segment.table.select(KnownFile._fields[2:]).take(rows)
            columns = (column.to_pylist() for column in table.columns)
            for values in zip(rows.tolist(), *columns, strict=True):
                yield KnownFile(one.segment, *values)

    def errors(self, paths: Sequence[str] | None) -> dict[str, str]:
        """Why files cannot be searched, by path; of all files, or of some."""
        reasons = dict(itertools.chain(*(one.errors() for one in self.listed)))
        chosen = reasons if paths is None else reasons.keys() & paths
        return {path: reasons[path] for path in sorted(chosen)}

    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(path.stat().st_size for path in (self.directory / _SEGMENTS).glob("*/*"))

    def put(self, videos: Sequence[VideoRecord], gone: Sequence[str] = ()) -> None:
        """Adds or replaces videos, and removes the paths `gone`, in one commit; or Unavailable."""
        paths = {video.path for video in videos} | set(gone)
        if not paths:
            return
        listed = []
        for one in self.listed:
            mask = one.gone.copy()
            mask[[row for path in paths if (row := one.segment.find(path)) is not None]] = True
            listed.append(Listed(one.segment, mask))
        self._commit(listed, videos)

    def merge(self, *, light: bool = False) -> None:
        """Writes segments of like sizes as one, and those anew of which much is gone.

        The time of a light merge, of small segments, does not depend on the size of the index.
        """
        while chosen := self._mergeable(light):
            try:
                records = [
                    one.segment.read(row) for one in chosen for row in np.flatnonzero(~one.gone)
                ]
            except ValueError:
                return  # The next update that looks at all files decodes what is damaged.
            self._commit([one for one in self.listed if one not in chosen], records)
            with _writing(self.directory):
                for one in chosen:
                    shutil.rmtree(one.segment.directory)

    def _mergeable(self, light: bool) -> list[Listed]:
        sizes = {one: len(one.gone) + one.segment.window_count for one in self.listed}
        allowed = [one for one in self.listed if not light or sizes[one] <= _LIGHT]
        tiers = [max(0, int(math.log(sizes[one] / _SMALLEST, _MERGED))) for one in allowed]
        return [
            one
            for one, tier in zip(allowed, tiers, strict=True)
            if tiers.count(tier) >= _MERGED or one.gone.mean() > _MOST_GONE
        ]

    def _commit(self, listed: list[Listed], videos: Sequence[VideoRecord] = ()) -> None:
        """Writes a segment of new videos, if there are any, and the list of all segments."""
        directory = self.directory / _SEGMENTS
        with _writing(self.directory):
            if videos:
                segment = Segment(directory, write_segment(directory, videos))
                segment.verified[:] = True
                listed = [*listed, Listed(segment, np.zeros(len(segment), bool))]
            entries = [
                {**one.segment.entry, "gone": np.flatnonzero(one.gone).tolist()} for one in listed
            ]
            header = {**self.header, "format": FORMAT, "segments": entries}
            write_json(self.directory / _INDEX, seal(header), durable=True)
        self.header, self.listed = header, listed


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Reports a full or failing disk in one line; what was committed is unchanged."""
    try:
        yield
    except OSError as error:
        raise Unavailable(directory, error, "written") from error


def join(directory: Path, shards: Sequence[Path]) -> list[IndexPart]:
    """Writes an index that opens several others as one; an existing list is replaced.

    Raises a SearchIndexError if they cannot be opened as one, or Unavailable.
    """
    if (directory / _INDEX).exists() and "segments" in read_header(directory):
        raise SearchIndexError(f"{directory} is an index with videos; give another directory")
    here = directory.resolve()
    found = (part.resolve() for shard in shards for part in part_directories(shard))
    parts = [IndexPart(part) for part in dict.fromkeys(found)]
    check_alike(parts)
    check_distinct(parts)
    # Relative if they lie beside the list, so that both can be moved.
    listed = [
        os.path.relpath(path, here) if path.is_relative_to(here.parent) else str(path)
        for path in (part.directory for part in parts)
    ]
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / _INDEX, seal({"format": FORMAT, "parts": listed}), durable=True)
    return parts


def check_alike(parts: Sequence[IndexPart]) -> None:
    """Raises a SearchIndexError if indexes differ in what their features depend on."""
    for name, part in itertools.product(_SHARED, parts):
        if part.header.get(name) != parts[0].header.get(name):
            raise SearchIndexError(
                f"the indexes {parts[0].directory} and {part.directory} cannot be joined: they"
                f" differ in their {MADE_WITH[name]}; index one of them again"
            )


def check_distinct(parts: Sequence[IndexPart]) -> None:
    """Raises a SearchIndexError if a file is in two indexes."""
    shards = {(part.header["videos"], part.header.get("shard")) for part in parts}
    counts = {(folder, shard and shard.partition("/")[2]) for folder, shard in shards}
    if len(counts) == 1 and len(shards) == len(parts):
        return  # Different shards of one folder have no file in common.
    owners: dict[str, IndexPart] = {}
    for part in parts:
        for path in part.paths():
            if (other := owners.setdefault(path, part)) is not part:
                raise SearchIndexError(
                    f"the video {path} is in two shards, {other.directory} and {part.directory};"
                    " index one of them again without it, or join the others without that shard"
                )


def read_progress(*directories: Path) -> dict[str, int] | None:
    """Sums of `show_progress` of the processes that update indexes; None if there are none.

    The file of a process that was killed is no progress: the lock of its index is free.
    """
    running = []
    for directory in directories:
        with contextlib.suppress(OSError, ValueError):
            progress = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))
            if is_locked(directory / LOCK):
                running.append(progress)
    return {name: sum(one[name] for one in running) for name in running[0]} if running else None
