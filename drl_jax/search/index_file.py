"""An index: one sealed file, `index.json`, that lists immutable segments.

The file says what the index was made with, which segments it has, and which of their videos are
gone. An update writes new segments and then replaces the file, which is the commit: a writer that
is killed leaves segments that nothing lists, and the next one deletes them. A joined index lists
other indexes instead, its parts, which are updated on their own.
"""

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.runtime.errors import Unavailable, one_line, refusal
from drl_jax.runtime.files import seal, unseal, write_json
from drl_jax.runtime.lock import is_locked, locked
from drl_jax.search.segments import SearchIndexError, Segment, VideoRecord, write_segment

FORMAT = 7
LOCK = "lock"
_INDEX, _SEGMENTS, _DAMAGED, _SPOOL = "index.json", "segments", "damaged_segments", "spool"
# What earlier versions wrote.
_EARLIER = ("index.sqlite", "shards.json")
# Fields of the header in which parts must agree, and their names in messages.
_SHARED = {
    "fingerprint": "model",
    "storage": "--storage",
    "fps": "--fps",
    "bank": "captions of weak matches (the dataset of the model is at hand for one of them only)",
    "hubness": "--bank",
}
# As many segments of one size are merged; sizes grow by this factor.
_MERGED, _SMALLEST = 16, 64
# An update of single files merges no more windows and videos than this.
_LIGHT = 16 * _SMALLEST * _MERGED
# A segment is written again when more of its videos than this share are gone.
_MOST_GONE = 0.25
_ATTEMPTS = 3
# How far an update is, for the processes that search; no part of the index. Seconds between writes.
_PROGRESS, _INTERVAL = "indexing.json", 1.0


def read_header(directory: Path) -> dict[str, Any]:
    """What `index.json` holds.

    Raises:
      SearchIndexError: there is no index, it is damaged, or another version made it.
      Unavailable: it cannot be read.
    """
    try:
        header = unseal((directory / _INDEX).read_text(encoding="utf-8"))
        if header["format"] > FORMAT:
            raise SearchIndexError(
                f"the index {directory} has format {header['format']}, and this version reads"
                f" {FORMAT}; use the version that made it, or index the videos into another --index"
            )
        return header
    except (FileNotFoundError, NotADirectoryError) as error:
        if any((directory / name).exists() for name in _EARLIER):
            raise SearchIndexError(
                f"the index {directory} was made by an earlier version, which this one does not"
                " read; make it anew in another directory with: python -m drl_jax.search index"
                " --workdir=RUN --videos=DIR --index=DIR"
            ) from error
        raise SearchIndexError(
            f"there is no index in {directory}; make it with: python -m drl_jax.search index"
            f" --workdir=RUN --videos=DIR --index={directory}"
        ) from error
    except OSError as error:
        raise Unavailable(directory / _INDEX, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SearchIndexError(
            f"{directory / _INDEX} is damaged ({one_line(error)}); index the videos into another"
            " --index, or restore this file"
        ) from error


def part_directories(directory: Path) -> list[Path]:
    """The directories of the parts of an index: its own, or those that it joins.

    Raises:
      SearchIndexError, Unavailable: see `read_header`.
    """
    parts = read_header(directory).get("parts")
    return [directory] if parts is None else [_normal(directory / part) for part in parts]


def index_version(directory: Path) -> dict[Path, tuple[int, ...]]:
    """For each part of an index, what differs after every commit of it; empty if it is not there.

    Raises:
      SearchIndexError, Unavailable: see `read_header`.
    """
    found: dict[Path, tuple[int, ...]] = {}
    for part in part_directories(directory):
        try:
            status = (part / _INDEX).stat()
            found[part] = (status.st_ino, status.st_mtime_ns, status.st_size)
        except OSError:
            found[part] = ()
    return found


class Part(NamedTuple):
    """A state of an index that is not joined.

    Attributes:
      directory: of the index.
      header: what it was made with.
      segments: open.
      gone: for each segment, bool [V], videos that were removed or replaced.
    """

    directory: Path
    header: dict[str, Any]
    segments: list[Segment]
    gone: list[np.ndarray]


def open_part(directory: Path, known: Sequence[Segment] = ()) -> Part:
    """Opens one state of an index that is not joined.

    Args:
      directory: of the index.
      known: segments that are open already.

    Raises:
      SearchIndexError, Unavailable: see `read_header`; or a segment is damaged.
    """
    opened = {segment.directory: segment for segment in known}
    for attempt in itertools.count(1):
        header = read_header(directory)
        try:
            segments = [
                opened.get(directory / _SEGMENTS / entry["name"])
                or Segment(directory / _SEGMENTS, entry)
                for entry in header["segments"]
            ]
            for segment in segments:
                segment.check_files()
            gone = [_gone(s, e) for s, e in zip(segments, header["segments"], strict=True)]
            return Part(directory, header, segments, gone)
        except (OSError, ValueError) as error:
            # A merge may have deleted segments since the header was read.
            if attempt == _ATTEMPTS:
                raise failure(directory, error) from error
    raise AssertionError


def failure(directory: Path, error: Exception) -> SearchIndexError | Unavailable:
    """The error of an index of which something is damaged, or cannot be read."""
    if (refused := refusal(error)) is not None:
        return Unavailable(directory, refused)
    return SearchIndexError(
        f"the index {directory} is damaged ({one_line(error)}); index the videos again, and only"
        " the damaged ones are decoded"
    )


class KnownFile(NamedTuple):
    """What an update compares a file with.

    Attributes:
      segment: that has it; a merge may have replaced it since.
      row: in the segment.
      path, size, mtime_ns, sha256, allowed: as in `VideoRecord`.
    """

    segment: Segment
    row: int
    path: str
    size: int
    mtime_ns: int
    sha256: str
    allowed: float


class IndexWriter:
    """An index that this process alone writes; a context manager.

    Attributes:
      directory: of the index.
      header: what it was made with, and its segments; empty before `create`.
      segments: open, in the order of the header.
    """

    def __init__(self, directory: Path):
        """Locks an index and opens it; a new one is empty.

        Segments that are damaged are moved to `damaged_segments`, with a line on stdout: their
        videos are decoded again.

        Raises:
          LockError: another process writes to it.
          SearchIndexError, Unavailable: see `read_header`.
        """
        self.directory, self._stack = directory, contextlib.ExitStack()
        self.header: dict[str, Any] = {}
        self.segments: list[Segment] = []
        with contextlib.ExitStack() as stack, self._writing():
            stack.enter_context(locked(directory / LOCK, f"the index {directory}"))
            if (directory / _INDEX).exists() or any((directory / e).exists() for e in _EARLIER):
                self.header = read_header(directory)
            if "parts" in self.header:
                raise SearchIndexError(
                    f"{directory} joins other indexes; index their videos, each on its own"
                )
            (directory / _SEGMENTS).mkdir(exist_ok=True)
            self._delete_unlisted()
            self._open_segments()
            self._stack = stack.pop_all()

    def __enter__(self) -> "IndexWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.directory / _SPOOL, ignore_errors=True)
        self._stack.close()

    def _delete_unlisted(self) -> None:
        listed = {entry["name"] for entry in self.header.get("segments", ())}
        for path in (self.directory / _SEGMENTS).iterdir():
            if path.name not in listed:
                shutil.rmtree(path)
        shutil.rmtree(self.directory / _SPOOL, ignore_errors=True)

    def _open_segments(self) -> None:
        damaged = []
        for entry in self.header.get("segments", ()):
            try:
                self.segments.append(Segment(self.directory / _SEGMENTS, entry))
            except (OSError, ValueError) as error:
                if refusal(error) is not None:
                    raise failure(self.directory, error) from error
                damaged.append((entry, error))
        if not damaged:
            return
        lost = [entry["name"] for entry, _ in damaged]
        self._commit([e for e in self.header["segments"] if e["name"] not in lost])
        for entry, error in damaged:
            source, aside = self.directory / _SEGMENTS / entry["name"], self.directory / _DAMAGED
            if source.exists():
                aside.mkdir(exist_ok=True)
                source.rename(aside / entry["name"])
            print(
                f"{entry['videos']} videos are indexed again: a segment is damaged"
                f" ({one_line(error)}); what is left of it is in {aside}"
            )

    def create(self, **about: Any) -> None:
        """Makes a new index of what it is made with."""
        self.header = about
        self._commit([])

    def update_header(self, **changes: Any) -> None:
        """Commits changes of what the index was made with."""
        self.header = {**self.header, **changes}
        self._commit(self.header["segments"])

    def spool_file(self, number: int) -> Path:
        """A file that is deleted at the end."""
        with self._writing():
            (self.directory / _SPOOL).mkdir(exist_ok=True)
        return self.directory / _SPOOL / str(number)

    # ------------------------------------------------------------------ reading

    def files(self) -> Iterator[KnownFile]:
        """What is known of all files."""
        for number, segment in enumerate(self.segments):
            columns = [segment.table.column(name) for name in KnownFile._fields[2:]]
            gone = _gone(segment, self.header["segments"][number])
            for row in np.flatnonzero(~gone).tolist():
                yield KnownFile(segment, row, *(column[row].as_py() for column in columns))

    def file_at(self, path: str) -> KnownFile | None:
        """What is known of one file; its time does not depend on the number of files."""
        for number, segment in enumerate(self.segments):
            row = segment.find(path)
            if row is not None and row not in self.header["segments"][number]["gone"]:
                values = segment.table.slice(row, 1).to_pylist()[0]
                return KnownFile(segment, row, *(values[name] for name in KnownFile._fields[2:]))
        return None

    def is_damaged(self, file: KnownFile) -> bool:
        """Whether the features of a file differ from their checksum."""
        try:
            file.segment.verify(file.row)
        except ValueError:
            return True
        return False

    def record(self, file: KnownFile) -> VideoRecord:
        """All that the index has of a file."""
        return file.segment.read(file.row)

    def errors(self, paths: Sequence[str] | None) -> dict[str, str]:
        """Why files cannot be searched, by path; of all files, or of some."""
        if paths is not None:
            known = [file for path in paths if (file := self.file_at(path)) is not None]
            rows = [(file.segment, [file.row]) for file in known]
        else:
            pairs = zip(self.segments, self.header["segments"], strict=True)
            rows = [(segment, np.flatnonzero(~_gone(segment, entry))) for segment, entry in pairs]
        found = {}
        for segment, chosen in rows:
            path, error = (segment.table.column(c) for c in ("path", "error"))
            chosen = [row for row in map(int, chosen) if error[row].as_py()]
            found |= {path[row].as_py(): error[row].as_py() for row in chosen}
        return dict(sorted(found.items()))

    def windows(self) -> int:
        """Number of windows of all videos."""
        pairs = zip(self.segments, self.header["segments"], strict=True)
        return sum(int(s.column("windows")[~_gone(s, entry)].sum()) for s, entry in pairs)

    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self.segments)

    # ------------------------------------------------------------------ writing

    def put(self, videos: Sequence[VideoRecord], gone: Sequence[str] = ()) -> None:
        """Adds or replaces videos, and removes those with the paths `gone`, in one commit.

        Raises:
          SearchIndexError: the disk is full or cannot be written; the index is as it was.
        """
        paths = {video.path for video in videos} | set(gone)
        if not paths:
            return
        entries = [self._without(number, paths) for number in range(len(self.segments))]
        with self._writing():
            if videos:
                entries.append(write_segment(self.directory / _SEGMENTS, videos))
                self.segments.append(Segment(self.directory / _SEGMENTS, entries[-1]))
                self.segments[-1].verified[:] = True
            self._commit(entries)

    def _without(self, number: int, paths: set[str]) -> dict[str, Any]:
        """The entry of a segment after the removal of some paths."""
        segment, entry = self.segments[number], self.header["segments"][number]
        rows = {row for path in paths if (row := segment.find(path)) is not None}
        return {**entry, "gone": sorted({*entry["gone"], *rows})}

    def merge(self, *, light: bool = False) -> None:
        """Writes segments of like sizes as one, and those anew of which much is gone.

        Args:
          light: only small ones: the time does not depend on the size of the index.
        """
        while chosen := self._mergeable(light):
            try:
                records = [
                    self.segments[n].read(row)
                    for n in chosen
                    for row in np.flatnonzero(~_gone(self.segments[n], self.header["segments"][n]))
                ]
            except ValueError:
                return  # The next update that looks at all files decodes what is damaged.
            with self._writing():
                entries = [e for n, e in enumerate(self.header["segments"]) if n not in chosen]
                old = [self.segments[n].directory for n in chosen]
                self.segments = [s for n, s in enumerate(self.segments) if n not in chosen]
                if records:
                    entries.append(write_segment(self.directory / _SEGMENTS, records))
                    self.segments.append(Segment(self.directory / _SEGMENTS, entries[-1]))
                    self.segments[-1].verified[:] = True
                self._commit(entries)
                for directory in old:
                    shutil.rmtree(directory)

    def _mergeable(self, light: bool) -> list[int]:
        sizes = [len(segment) + int(segment.firsts["window"][-1]) for segment in self.segments]
        gone = [len(entry["gone"]) / entry["videos"] for entry in self.header["segments"]]
        allowed = [n for n, size in enumerate(sizes) if not light or size <= _LIGHT]
        chosen = [n for n in allowed if gone[n] > _MOST_GONE]
        tiers: dict[int, list[int]] = {}
        for n in allowed:
            tier = max(0, int(np.log(max(sizes[n] / _SMALLEST, 1)) / np.log(_MERGED)))
            tiers.setdefault(tier, []).append(n)
        return sorted(
            {*chosen, *(n for same in tiers.values() if len(same) >= _MERGED for n in same)}
        )

    def _commit(self, entries: list[dict[str, Any]]) -> None:
        self.header = {**self.header, "segments": entries}
        with self._writing():
            values = seal({"format": FORMAT, **self.header})
            write_json(self.directory / _INDEX, values, durable=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Reports a full or failing disk in one line; what was committed is unchanged."""
        try:
            yield
        except OSError as error:
            raise Unavailable(self.directory, error, "written") from error


def join(directory: Path, shards: Sequence[Path]) -> list[Part]:
    """Writes an index that opens several others as one; an existing list is replaced.

    Args:
      directory: of the joined index; created if it does not exist.
      shards: directories of the others.

    Returns:
      The shards.

    Raises:
      SearchIndexError: a shard is no index, or twice there, they are not alike, a video is in two
        of them, or the directory is an index of its own.
      Unavailable: a file cannot be read or written.
    """
    with contextlib.suppress(FileNotFoundError):
        if (directory / _INDEX).stat() and "parts" not in read_header(directory):
            raise SearchIndexError(f"{directory} is an index with videos; give another --index")
    shards = [_normal(shard) for shard in shards]
    for shard in shards:
        if "parts" in read_header(shard):
            raise SearchIndexError(f"{shard} is a joined index; name its shards instead")
    for one, other in itertools.combinations(shards, 2):
        if one.resolve() == other.resolve():
            raise SearchIndexError(f"{other} is named twice; name each shard once")
    parts = [open_part(shard) for shard in shards]
    check_alike(parts)
    check_distinct(parts)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        listed = [_written(directory, shard) for shard in shards]
        write_json(directory / _INDEX, seal({"format": FORMAT, "parts": listed}), durable=True)
    except OSError as error:
        raise Unavailable(directory, error, "written") from error
    return parts


def check_alike(parts: Sequence[Part]) -> None:
    """Checks that indexes can be searched as one.

    Raises:
      SearchIndexError: they differ in what their features depend on.
    """
    first, *others = parts
    for part in others:
        for name, what in _SHARED.items():
            if part.header.get(name) != first.header.get(name):
                raise SearchIndexError(
                    f"the indexes {first.directory} and {part.directory} cannot be joined: they"
                    f" differ in their {what}; index one of them again"
                )
    layouts = {
        str(sorted(layout.items())): part.directory
        for part in parts
        for entry in part.header["segments"]
        if (layout := {n: a for n, a in entry["arrays"].items() if not n.startswith("strip.")})
    }
    if len(layouts) > 1:
        one, other = list(layouts.values())[:2]
        raise SearchIndexError(
            f"the indexes {one} and {other} cannot be searched as one: their arrays differ; index"
            " one of them again"
        )


def check_distinct(parts: Sequence[Part]) -> None:
    """Checks that no file is in two indexes.

    Raises:
      SearchIndexError: one is.
    """
    shards = {(p.header["videos"], p.header.get("shard")) for p in parts if p.header.get("shard")}
    counts = {(folder, shard.partition("/")[2]) for folder, shard in shards}
    if len(parts) == 1 or (len(shards) == len(parts) and len(counts) == 1):
        return  # Different shards of one folder have no file in common.
    seen: dict[str, Path] = {}
    for part in parts:
        for segment, gone in zip(part.segments, part.gone, strict=True):
            paths = segment.table.column("path")
            for row in np.flatnonzero(~gone).tolist():
                path = os.path.join(part.header["videos"], paths[row].as_py())  # noqa: PTH118
                other = seen.setdefault(path, part.directory)
                if other != part.directory:
                    raise SearchIndexError(
                        f"the video {path} is in two shards, {other} and {part.directory}; index"
                        " one of them again without it, or join the others without that shard"
                    )


def common_folder(headers: Sequence[Mapping[str, Any]]) -> tuple[Path, list[str]]:
    """The deepest folder that has those of several indexes, and for each "" or e.g. "disk1/"."""
    folders = [header["videos"] for header in headers]
    root = os.path.commonpath(folders)
    relative = [os.path.relpath(folder, root) for folder in folders]
    return Path(root), ["" if path == "." else f"{path}/" for path in relative]


def _gone(segment: Segment, entry: Mapping[str, Any]) -> np.ndarray:
    mask = np.zeros(len(segment), bool)
    mask[entry["gone"]] = True
    return mask


def _written(directory: Path, shard: Path) -> str:
    """A shard as it is listed: relative if it lies beside the list, so that both can be moved."""
    whole, shard = directory.resolve().parent, shard.resolve()
    if shard.is_relative_to(whole):
        return os.path.relpath(shard, directory.resolve())
    return str(shard)


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))


# ---------------------------------------------------------------------- progress


class Progress(NamedTuple):
    """Progress of an update.

    Attributes:
      done: files that were read.
      total: new and changed files.
    """

    done: int
    total: int


class ProgressFile:
    """Writes the progress of an update; a context manager that deletes the file at its end.

    A file that cannot be written is left out: the update itself reports a full disk.
    """

    def __init__(self, directory: Path, total: int):
        """Writes nothing.

        Args:
          directory: of the index, which this process has locked.
          total: new and changed files.
        """
        self._path, self._total = directory / _PROGRESS, total
        self._next_write = 0.0

    def __enter__(self) -> "ProgressFile":
        self.update(0)
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def update(self, done: int) -> None:
        """Writes the number of files that were read, at most once a second."""
        if not self._total or time.monotonic() < self._next_write:
            return
        self._next_write = time.monotonic() + _INTERVAL
        with contextlib.suppress(OSError):
            write_json(self._path, {"done": done, "total": self._total})


def progress_of(directories: Iterable[Path]) -> Progress | None:
    """The progress of the processes that update the parts of an index; None if there is none."""
    found = [progress for directory in directories if (progress := read_progress(directory))]
    return Progress(*map(sum, zip(*found, strict=True))) if found else None


def read_progress(directory: Path) -> Progress | None:
    """The progress of the process that updates an index; None if there is none.

    The file of a process that was killed is no progress: the lock of the index is free.

    Args:
      directory: of the index.
    """
    try:
        values = json.loads((directory / _PROGRESS).read_text(encoding="utf-8"))
        progress = Progress(int(values["done"]), int(values["total"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return progress if is_locked(directory / LOCK) else None
