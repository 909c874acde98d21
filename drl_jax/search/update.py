"""Creates an index of a folder of videos, and updates it to what has changed there."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes
from drl_jax.search.encoding import WindowEncoder, bank_of, check_bank, write_bank
from drl_jax.search.index_file import IndexWriter, KnownFile
from drl_jax.search.reading import (
    FoundFile,
    FrameSampling,
    VideoRead,
    find_videos,
    found_file,
    is_text,
    is_video,
    names_of_no_files,
    read_video,
)
from drl_jax.search.segments import SearchIndexError, VideoRecord

if TYPE_CHECKING:
    from drl_jax.runtime.ray_cluster import RayCluster

# Videos that a worker may read ahead; a long one waits in a file as large as its frames.
AHEAD = 2
# Videos wait at most so long for their batch to be full, seconds: a kill loses no more work.
_STORED_EVERY = 15.0
# Shards of a folder, at most.
_MAX_SHARDS = 100_000


class Shard(NamedTuple):
    """A part of the files of a folder, chosen by a hash of their paths.

    Attributes:
      number: from 0.
      count: number of shards.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads NUMBER/COUNT, e.g. 3/16.

        Raises:
          UserError: it is something else.
        """
        number, _, count = text.partition("/")
        if number.isdecimal() and count.isdecimal() and int(number) < int(count) <= _MAX_SHARDS:
            return cls(int(number), int(count))
        raise UserError(f"--shard={text}: write NUMBER/COUNT, from 0/16 to 15/16 for 16 shards")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, path: str) -> bool:
        """Whether a file is in this shard; the same on every machine."""
        digest = hashlib.sha256(os.fsencode(path)).digest()
        return int.from_bytes(digest[:8]) % self.count == self.number


@dataclasses.dataclass
class IndexReport:
    """Result of an update.

    Attributes:
      added, changed, moved, removed, unchanged: numbers of files. Changed ones have other content,
        or their features were damaged.
      bad: why files cannot be searched, by path; of all files that were compared.
      unavailable: why files were not read, which is no property of them: the next update tries them
        again.
      skipped: names of videos that are not files: links to nothing, pipes, devices.
      windows, nbytes: windows and bytes of the whole index.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    unavailable: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)
    windows: int = 0
    nbytes: int = 0


class FramesLostError(Exception):
    """Frames that were read are gone before they were encoded; they must be read again."""


class Encoded(Protocol):
    """The arrays of a batch of videos (`WindowEncoder.encode`), e.g. a Future."""

    def done(self) -> bool:
        """Whether `result` returns at once."""

    def result(self) -> list[dict[str, np.ndarray]]:
        """Waits for the arrays, or raises FramesLostError."""


class IndexEngine(Protocol):
    """Reads and encodes videos: this process and its workers, or a cluster (`ray_update.py`)."""

    def read(
        self, calls: Sequence[tuple], allowed: Sequence[float]
    ) -> Iterator[VideoRead | WorkerFailure]:
        """Calls `read_video` with arguments and seconds; `frames` may be a reference."""

    def encode(self, reads: Sequence[VideoRead]) -> Encoded:
        """Starts to encode all windows of a batch."""

    def batches(self) -> int:
        """Batches that may be encoded while an earlier one is not stored."""


class _LocalEngine:
    """Worker processes read, and this process encodes."""

    def __init__(self, encoder: WindowEncoder):
        self._encoder = encoder

    def read(
        self, calls: Sequence[tuple], allowed: Sequence[float]
    ) -> Iterator[VideoRead | WorkerFailure]:
        return map_in_processes(read_video, calls, timeout=allowed, ahead=AHEAD)

    def encode(self, reads: Sequence[VideoRead]) -> concurrent.futures.Future:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_result(self._encoder.encode(reads))
        return future

    def batches(self) -> int:
        return 0


def update_index(
    model: RetrievalModel,
    videos: Path,
    directory: Path,
    *,
    storage: str = "bfloat16",
    fps: float = 1.0,
    timeout: float = 300.0,
    prune: bool = False,
    bank: Sequence[str] = (),
    only: Sequence[str] = (),
    shard: Shard | None = None,
    cluster: "RayCluster | None" = None,
) -> IndexReport:
    """Updates an index to the files of a folder; decodes only new and changed files.

    What is encoded is committed every few seconds: after an interruption, the same call continues.
    A file with the content of one that is gone takes over its features. A video whose features are
    damaged is decoded again.

    Args:
      model: encodes the videos.
      videos: folder of the videos, searched recursively. That of an existing index may have been
        moved.
      directory: of the index; created if it does not exist.
      storage: how features are stored, one of `drl_jax.search.STORAGES`.
      fps: frames a second that are stored of files of several windows, 1 to 4.
      timeout: see `allowed_seconds`. A video that took longer is tried again when this is larger.
      prune: remove files that are gone also if they are most of the index.
      bank: captions of other videos, to rank without hubs; those of an existing index need not be
        given again.
      only: adds, updates or removes only these files, paths relative to the folder; empty: all. The
        time does not depend on the sizes of the folder and of the index.
      shard: of a new index: only the files of this shard of the folder. An index remembers it.
      cluster: decodes and encodes; None: this process and its workers do.

    Raises:
      UserError: the folder does not exist, there is no video, most of the files are gone, the
        index is of another model, folder, storage or bank, or a node of the cluster cannot work.
    """
    if not videos.is_dir():
        raise UserError(f"no directory {videos}; --videos names the folder of the videos")
    with IndexWriter(directory) as writer:
        _check_made_with(writer, model, videos, storage, fps, bank, shard)
        stored = writer.header.get("shard")
        shard = Shard.parse(stored) if stored else None
        if only:
            changes = _changes_of_files(writer, videos, timeout, only, shard)
            is_mounted = not changes.missing or any(videos.iterdir())
        else:
            changes = _changes_of_folder(writer, videos, timeout, shard)
            is_mounted = changes.lost() <= changes.total / 2
        if not (is_mounted or prune):
            raise UserError(
                f"{changes.lost()} of the {changes.total} videos of the index {directory} are not"
                f" in {videos}: is it the right folder, and mounted? --prune removes them from the"
                " index"
            )
        update = _Update(writer, model, videos, changes)
        return update.run(update.engine(cluster))


def _check_made_with(
    writer: IndexWriter,
    model: RetrievalModel,
    videos: Path,
    storage: str,
    fps: float,
    bank: Sequence[str],
    shard: Shard | None,
) -> None:
    """Writes what a new index is made with, or checks that it is the same."""
    folder, header = str(videos.resolve()), writer.header
    if not header:
        writer.update_header(
            source=model.source,
            fingerprint=model.fingerprint,
            videos=folder,
            storage=storage,
            fps=fps,
            bank=bank_of(model.config),
            **({"hubness": write_bank(writer.directory, bank)} if bank else {}),
            **({"shard": str(shard)} if shard else {}),
        )
        return
    # A folder that is not there any more may have been moved.
    is_folder = header["videos"] == folder or not Path(header["videos"]).is_dir()
    for matches, other in (
        (header["fingerprint"] == model.fingerprint, "model"),
        (is_folder, f"folder, {header['videos']}"),
        (header["storage"] == storage, f"storage, {header['storage']}"),
        (header["fps"] == fps, f"--fps, {header['fps']:g}"),
        (
            shard is None or header.get("shard") == str(shard),
            f"--shard, {header.get('shard', 'all files')}",
        ),
    ):
        if not matches:
            raise SearchIndexError(
                f"the index {writer.directory} was made with another {other}; give another --index"
            )
    if bank:
        check_bank(writer.directory, header, bank)
    if header["videos"] != folder:
        writer.update_header(videos=folder)


# ---------------------------------------------------------------------- what has changed


@dataclasses.dataclass
class _Changes:
    """The files that an update has to look at; those that have not changed are only counted.

    Attributes:
      pending: new and changed files, and those with damaged features.
      known: what the index has of the pending files, by path.
      damaged: paths of those with damaged features.
      missing: files of the index that are gone, by path.
      unchanged: number of the other files.
      total: number of files of the index.
      paths: of the files that were compared; None: all.
      misnamed: paths that are not UTF-8.
      skipped: names of videos that are no files.
    """

    pending: list[FoundFile] = dataclasses.field(default_factory=list)
    known: dict[str, KnownFile] = dataclasses.field(default_factory=dict)
    damaged: set[str] = dataclasses.field(default_factory=set)
    missing: dict[str, KnownFile] = dataclasses.field(default_factory=dict)
    unchanged: int = 0
    total: int = 0
    paths: list[str] | None = None
    misnamed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def add(self, writer: IndexWriter, file: KnownFile | None, found: FoundFile | None) -> None:
        """Compares what the index has of a file with the file; None: it is not there."""
        if file is None:
            self.pending.append(found)
            return
        self.total += 1
        is_damaged = file.is_damaged()
        if is_damaged:
            self.damaged.add(file.path)
        if found is None:
            self.missing[file.path] = file
        elif is_damaged or _is_outdated(file, found):
            self.known[file.path] = file
            self.pending.append(found)
        else:
            self.unchanged += 1

    def lost(self) -> int:
        """Number of missing files of whose size there is no new one."""
        new = collections.Counter(file.size for file in self.pending if file.path not in self.known)
        gone = collections.Counter(file.size for file in self.missing.values())
        return (gone - new).total()


def _is_outdated(known: KnownFile, found: FoundFile) -> bool:
    """Whether a file has changed, or may be decoded in the time that is allowed now."""
    if (known.size, known.mtime_ns) != (found.size, found.mtime_ns):
        return True
    return bool(known.allowed) and found.allowed > known.allowed


def _changes_of_folder(
    writer: IndexWriter, folder: Path, timeout: float, shard: Shard | None
) -> _Changes:
    """Compares an index with all files of its folder, and checks its features."""
    known = {file.path: file for file in writer.files()}
    changes, has_names = _Changes(), bool(known)
    for found in find_videos(folder, timeout):
        if not is_text(found.path):
            changes.misnamed.append(found.path)
            continue
        has_names = True
        if shard is None or shard.has(found.path):
            changes.add(writer, known.pop(found.path, None), found)
    if not has_names:
        raise UserError(f"no video in {folder} (looked for {' '.join(VIDEO_SUFFIXES)})")
    for path in sorted(known):
        changes.add(writer, known[path], None)
    changes.skipped = names_of_no_files(folder)
    return changes


def _changes_of_files(
    writer: IndexWriter, folder: Path, timeout: float, paths: Sequence[str], shard: Shard | None
) -> _Changes:
    """Compares an index with some files of its folder; reads nothing of the others."""
    root = folder.absolute()
    below = (PurePath(path) for path in paths)
    names = [str(p.relative_to(root) if p.is_relative_to(root) else p) for p in below]
    changes = _Changes(paths=list(dict.fromkeys(names)))
    for path in changes.paths:
        found, file = _find(folder, path, timeout), writer.file_at(path)
        if found is None and file is None:
            raise UserError(f"--only={path}: neither {folder} nor the index has such a video")
        if shard is not None and not shard.has(path):
            raise UserError(f"--only={path}: it is not in shard {shard} of {folder}")
        changes.add(writer, file, found)
    return changes


def _find(folder: Path, path: str, timeout: float) -> FoundFile | None:
    """The video file that `--only` names; None: there is none."""
    if PurePath(path).is_absolute() or ".." in PurePath(path).parts:
        raise UserError(f"--only takes paths below {folder}, not {path}")
    if not is_text(path):
        raise UserError(f"--only={ascii(path)[1:-1]}: its name is not UTF-8; rename it")
    file = folder / path
    if file.is_dir():
        raise UserError(f"--only takes files, and {file} is a folder")
    # A folder is listed by its own path only.
    root, parent = folder.resolve(), file.parent.resolve()
    if parent.is_relative_to(root) and parent.relative_to(root) != PurePath(path).parent:
        raise UserError(f"{file} leads through a link: name {parent.relative_to(root) / file.name}")
    return found_file(folder, path, timeout) if is_video(path) and file.is_file() else None


# ---------------------------------------------------------------------- the update


_Batch = list[tuple[FoundFile, VideoRead]]


class _Update:
    """One update of an index."""

    def __init__(self, writer: IndexWriter, model: RetrievalModel, folder: Path, changes: _Changes):
        self._writer, self._model, self._folder, self._changes = writer, model, folder, changes
        self._report = IndexReport(unchanged=changes.unchanged, skipped=changes.skipped)
        # Gone files whose features a file of the same content may take over, by size and path.
        self._movable: dict[int, dict[str, KnownFile]] = collections.defaultdict(dict)
        for path, gone in changes.missing.items():
            if path not in changes.damaged:
                self._movable[gone.size][path] = gone
        self._numbers = itertools.count()  # Of the files of long videos.
        self._sampling = FrameSampling(
            model.frame_form, model.config.data.max_frames, writer.header["fps"]
        )
        # What waits for the next commit: records of known content, and the paths that they leave.
        self._kept: list[VideoRecord] = []
        self._left: list[str] = []
        # The next batch and when it got its first video, and batches that are being encoded.
        self._next: _Batch = []
        self._since = time.monotonic()
        self._encoding: collections.deque[tuple[_Batch, Encoded]] = collections.deque()

    def engine(self, cluster: "RayCluster | None") -> IndexEngine:
        """What reads and encodes; checks the nodes of a cluster."""
        if cluster is None or not self._changes.pending:
            encoder = WindowEncoder(self._model, self._writer.directory, self._writer.header)
            return _LocalEngine(encoder)
        # Ray is optional.
        from drl_jax.search.ray_update import RayEngine

        example = self._folder / self._changes.pending[0].path
        return RayEngine(cluster, self._model, self._writer, example)

    def run(self, engine: IndexEngine) -> IndexReport:
        """Reads, encodes and stores what has changed."""
        self._engine, pending = engine, self._changes.pending
        reads = engine.read(*self._calls(pending, self._known_sha256s))
        shown = tqdm(
            zip(pending, reads, strict=True),
            desc="indexing",
            total=len(pending),
            unit="video",
            disable=not pending,
        )
        for number, (file, read) in enumerate(shown):
            self._writer.show_progress(number, len(pending))
            self._take(file, _checked(read))
            self._writer.show_progress(number + 1, len(pending))
        self._encode()
        self._store(0)
        self._writer.put(self._kept, [*self._left, *self._changes.missing])
        self._report.removed = len(self._changes.missing)
        self._writer.merge(light=self._changes.paths is not None)
        return self._finished()

    def _finished(self) -> IndexReport:
        report, paths = self._report, self._changes.paths
        report.bad = self._writer.errors(paths) | {
            ascii(path)[1:-1]: "its name is not UTF-8; rename it" for path in self._changes.misnamed
        }
        report.windows, report.nbytes = self._writer.windows(), self._writer.nbytes()
        return report

    def _calls(
        self, files: Sequence[FoundFile], known_sha256s: Callable[[FoundFile], frozenset[str]]
    ) -> tuple[list[tuple], list[float]]:
        """The calls of `read_video`, and the seconds that each may take."""
        calls = [
            (
                # Absolute: the nodes of a cluster have other working directories.
                (self._folder / file.path).absolute(),
                known_sha256s(file),
                self._sampling,
                self._writer.spool_file(next(self._numbers)).absolute(),
            )
            for file in files
        ]
        return calls, [file.allowed for file in files]

    def _known_sha256s(self, file: FoundFile) -> frozenset[str]:
        """Contents for which a file need not be decoded."""
        known = self._changes.known.get(file.path)
        digests = {gone.sha256 for gone in self._movable[file.size].values()}
        # A video that took too long is decoded again, and so is one with damaged features.
        if known is not None and not known.allowed and file.path not in self._changes.damaged:
            digests.add(known.sha256)
        return frozenset(digests - {""})

    def _take(self, file: FoundFile, read: VideoRead) -> None:
        """Stores a file that was read, or adds it to the next batch."""
        known = self._changes.known.get(file.path)
        if read.failure:
            self._report.unavailable[file.path] = read.failure
            return
        if not read.is_known:
            self._report.added += known is None
            self._report.changed += known is not None
            self._add(file, read)
            return
        if known is not None and known.sha256 == read.sha256:  # Only its times have changed.
            self._keep(known, file)
            self._report.unchanged += 1
            return
        movable = self._movable[file.size]
        gone = next((gone for gone in movable.values() if gone.sha256 == read.sha256), None)
        if gone is None:  # Two new files have the content of one that is gone.
            calls, allowed = self._calls([file], self._known_sha256s)
            self._take(file, _checked(next(iter(self._engine.read(calls, allowed)))))
            return
        self._keep(gone, file)
        self._left.append(gone.path)
        del self._changes.missing[gone.path], movable[gone.path]
        self._report.moved += 1

    def _keep(self, known: KnownFile, file: FoundFile) -> None:
        """Stores what is known of a content with the path and the times of a file."""
        record = known.segment.read(known.row)
        self._kept.append(record._replace(path=file.path, mtime_ns=file.mtime_ns))

    # ------------------------------------------------------------------ batches

    def _add(self, file: FoundFile, read: VideoRead) -> None:
        if not self._next:
            self._since = time.monotonic()
        self._next.append((file, read))
        waiting = sum(len(read.windows) for _, read in self._next)
        is_full = waiting >= self._model.config.eval.batch_size
        if is_full or time.monotonic() - self._since > _STORED_EVERY:
            self._encode()
        self._store(self._engine.batches())

    def _encode(self) -> None:
        """Starts to encode the next batch."""
        batch, self._next = self._next, []
        if batch:
            self._encoding.append((batch, self._engine.encode([read for _, read in batch])))

    def _store(self, at_most: int) -> None:
        """Stores the batches that are encoded, in order; waits until `at_most` are left."""
        while self._encoding:
            batch, encoded = self._encoding[0]
            if len(self._encoding) <= at_most and not encoded.done():
                return
            try:
                arrays = encoded.result()
            except FramesLostError:
                batch = self._read_again(batch)
                encoded = self._engine.encode([read for _, read in batch])
                self._encoding[0] = (batch, encoded)
                continue
            self._encoding.popleft()
            self._put(batch, arrays)

    def _read_again(self, batch: _Batch) -> _Batch:
        """Reads the short videos of a batch again; the frames of long ones are in files."""
        lost = [file for file, read in batch if read.frames is not None]
        reads = iter(self._engine.read(*self._calls(lost, lambda file: frozenset())))
        again = [
            (file, read if read.frames is None else _checked(next(reads))) for file, read in batch
        ]
        self._report.unavailable |= {
            file.path: read.failure for file, read in again if read.failure
        }
        return [(file, read) for file, read in again if not read.failure]

    def _put(self, batch: _Batch, arrays: list[dict[str, np.ndarray]]) -> None:
        """Commits a batch that is encoded."""
        records = [
            VideoRecord(
                *(file.path, file.size, file.mtime_ns, read.sha256, read.error),
                allowed=file.allowed if read.timed_out else 0.0,
                duration=read.duration,
                arrays={**read.arrays, **encoded},
                strips=read.strips,
            )
            for (file, read), encoded in zip(batch, arrays, strict=True)
        ]
        self._writer.put([*self._kept, *records], self._left)
        self._kept, self._left = [], []
        self._writer.merge(light=True)
        for _, read in batch:
            if read.spooled is not None:
                with contextlib.suppress(OSError):
                    read.spooled.unlink(missing_ok=True)


def _checked(read: VideoRead | WorkerFailure) -> VideoRead:
    """What was read of a video, also if its reader failed."""
    if not isinstance(read, WorkerFailure):
        return read
    # A video that took too long is stored with the time that it had.
    if read.is_passing and not read.timed_out:
        return VideoRead("", failure=read.reason)
    return VideoRead("", read.reason, timed_out=read.timed_out)
