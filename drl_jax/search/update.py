"""Creates an index of a folder of videos, and updates it to what has changed there."""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from drl_jax.data.video_file import VIDEO_SUFFIXES
from drl_jax.models.interactions import Features
from drl_jax.pretrained.inputs import items_of
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import UserError, as_path, printable
from drl_jax.runtime.files import write_json
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes
from drl_jax.search import encoding, reading, text_index
from drl_jax.search.index_file import (
    MADE_WITH,
    IndexWriter,
    KnownFile,
    directory_for,
    has_index,
    list_part,
    part_directories,
    read_header,
)
from drl_jax.search.query import sampling_of
from drl_jax.search.reading import FoundFile, VideoRead
from drl_jax.search.segments import SearchIndexError, VideoRecord

if TYPE_CHECKING:
    from drl_jax.runtime.ray_cluster import RayCluster

# Videos that a worker may read ahead; a long one waits in a file as large as its frames.
_AHEAD = 2
# Videos wait at most so long for their batch to be full, seconds: a kill loses no more work.
_STORED_EVERY = 15.0
_MAX_SHARDS = 100_000
# On their versions frames depend.
_PACKAGES = ("av", "numpy", "pillow")


def parse_shard(text: str) -> str:
    """NUMBER/COUNT, e.g. 3/16, without leading zeros; raises a UserError if it is no shard."""
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and int(number) < int(count) <= _MAX_SHARDS:
        return f"{int(number)}/{int(count)}"
    raise UserError(f"--shard={text}: write NUMBER/COUNT, from 0/16 to 15/16 for 16 shards")


def is_in_shard(path: str, shard: str) -> bool:
    """Whether the hash of a file's path puts it in a shard; the same on every machine."""
    number, _, count = shard.partition("/")
    digest = hashlib.sha256(os.fsencode(path)).digest()
    return int.from_bytes(digest[:8]) % int(count) == int(number)


@dataclasses.dataclass(repr=False)
class IndexReport:
    """Numbers of files, and of windows and bytes of the whole index.

    Added and changed ones can be searched; those that cannot are in `bad`.
    """

    added: int = 0
    changed: int = 0  # Or with damaged features.
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    # By path, why files cannot be searched, and why the next update has to read others.
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    unavailable: dict[str, str] = dataclasses.field(default_factory=dict)
    # Number of transcripts of the whole index; by path, why others cannot be used.
    transcripts: int = 0
    bad_transcripts: dict[str, str] = dataclasses.field(default_factory=dict)
    windows: int = 0
    nbytes: int = 0

    @property
    def has_changed(self) -> bool:
        """Whether anything was done, or could not be."""
        counts = (self.added, self.changed, self.moved, self.removed)
        return any(counts) or bool(self.bad or self.unavailable)

    def __repr__(self) -> str:
        """The numbers, and then the files with a reason."""
        lines = [
            f"{self.added} added, {self.changed} changed, {self.moved} moved, {self.removed}"
            f" removed, {self.unchanged} unchanged; {len(self.bad)} cannot be searched;"
            f" {self.windows} windows take {self.nbytes / 1e6:.1f} MB"
        ]
        if self.transcripts:
            lines.append(f"transcripts that --text searches: {self.transcripts}")
        for reasons, title in (
            (self.bad, "cannot be searched"),
            (self.bad_transcripts, "transcripts that cannot be read"),
            (self.unavailable, "could not be read this time"),
        ):
            if reasons:
                lines.append(f"{title} ({len(reasons)}):")
            lines += [f"  {printable(path)}: {reason}" for path, reason in reasons.items()]
        return "\n".join(lines)


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
    shows_progress: bool = True,
    shard: str | None = None,
    cluster: "RayCluster | None" = None,
) -> IndexReport:
    """Updates an index to the files of a folder; decodes only new, changed and damaged ones.

    What is encoded is committed every few seconds: after an interruption, the same call continues.
    A file with the content of one that is gone takes over its features.

    Args:
      videos: their folder, searched recursively. That of an existing index may have been moved. An
        index that has another folder gets a part for this one, made as that was.
      storage: of features, one of `drl_jax.search.STORAGES`.
      fps: frames a second that are stored of files of several windows, 1 to 4.
      timeout: see `allowed_seconds`. A video that took longer is tried again when this is larger.
      prune: remove files that are gone also if they are most of the index.
      bank: of a new index: captions of other videos, to rank without hubs.
      only: paths in the folder; empty: all. The time for a few does not depend on its size.
      shows_progress: whether to print a bar.
      shard: of a new index: only the files of this shard, NUMBER/COUNT.

    Raises UserError: there is no video, most files are gone, the index was made with something
    else, or a node of the cluster cannot work.
    """
    folder, whole = videos.resolve(), directory
    if not videos.is_dir():
        parts = part_directories(whole) if has_index(whole) else []
        is_known = str(folder) in [read_header(part)["videos"] for part in parts]
        if not (is_known and prune):
            how = "is it mounted? pruning removes its videos" if is_known else "name the folder"
            raise UserError(f"no directory {videos}; {how}")
    directory, first = directory_for(whole, folder), {}
    if directory != whole:
        parent = part_directories(whole)[0]
        first = read_header(parent)
        bank = bank or encoding.read_bank(parent, first)
    made_with = {"source": model.source, "fingerprint": model.fingerprint, "fps": fps}
    made_with |= {"encoder": model.encoder, "videos": str(folder), "storage": storage}
    made_with["frames"] = "by time, as shown"
    if bank:
        made_with["hubness"] = encoding.describe_bank(bank)
    if shard is not None:
        made_with["shard"] = parse_shard(shard)
    if first:
        _check_made_with(whole, first, {n: v for n, v in made_with.items() if n != "videos"})
        directory.mkdir(parents=True, exist_ok=True)
    with IndexWriter(directory) as writer:
        is_new = not writer.header
        if is_new:
            captions = first["bank"] if first else encoding.bank_of(model.config)
            writer.header = {**made_with, "bank": captions}
        _check_made_with(directory, writer.header, made_with)
        update = _Update(writer, model, videos, timeout, shows_progress)
        update.compare(only)
        if not prune:
            update.check_mounted()
        # Nothing is written before the above succeeds. The folder may have been moved.
        if is_new or writer.header["videos"] != made_with["videos"]:
            writer.update_header(videos=made_with["videos"])
        if bank:
            write_json(directory / encoding.BANK_FILE, list(bank))
        if first:
            list_part(whole, directory)
        return update.run(cluster)


def add_videos(
    model: RetrievalModel,
    directory: Path,
    videos: str | os.PathLike | Sequence[str | os.PathLike],
    **how: Any,
) -> IndexReport:
    """Updates an index as it was made: to a folder, or to files of its folders (`Index.add`)."""
    given = [videos] if isinstance(videos, str | os.PathLike) else videos
    given = [as_path(path, "a video") for path in items_of(given, "add", "file")]
    headers = []
    if has_index(directory):
        headers = [read_header(part) for part in part_directories(directory)]
        how |= {name: headers[0][name] for name in ("storage", "fps")}
    folders = [Path(header["videos"]) for header in headers]
    chosen: dict[Path, list[str]] = {}
    for path in given:
        if path.is_dir() or path.resolve() in folders:
            chosen[path] = []
            continue
        place = path.parent.resolve() / path.name
        own = next((folder for folder in folders if place.is_relative_to(folder)), None)
        if own is None and not path.is_absolute() and folders and not place.exists():
            own, place = folders[0], folders[0] / path
        if own is None:
            if not place.exists():
                raise UserError(f"{path} does not exist, and no video of the index has that path")
            raise UserError(f"{path} is in no folder of the index {directory}; add its folder")
        chosen.setdefault(own, []).append(str(place.relative_to(own)))
    if not chosen:
        raise UserError("there is no video to add; give a folder or files")
    total = IndexReport()
    for folder, only in chosen.items():
        report = update_index(model, folder, directory, only=only, **how)
        for field in dataclasses.fields(IndexReport):
            one, other = getattr(total, field.name), getattr(report, field.name)
            setattr(total, field.name, one | other if isinstance(one, dict) else one + other)
    return total


def _check_made_with(directory: Path, header: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name, what in MADE_WITH.items():
        is_moved = name == "videos" and not Path(header[name]).is_dir()
        if name not in given or header.get(name) == given[name] or is_moved:
            continue
        other = f"another {what}" if name in header else f"no {what}"
        if isinstance(header.get(name), str | float) and name != "fingerprint":
            other += f", {header[name]}"
        raise SearchIndexError(
            f"the index {directory} was made with {other}; give another directory"
        )


class _Update:
    """One update of an index: files are compared, then read, and encoded in batches."""

    def __init__(
        self,
        writer: IndexWriter,
        model: RetrievalModel,
        folder: Path,
        timeout: float,
        shows_progress: bool,
    ):
        self._writer, self._model, self._folder, self._timeout = writer, model, folder, timeout
        self._report, self._is_silent = IndexReport(), not shows_progress
        self._paths: list[str] | None = None  # The files of `--only`; None: all.
        self._has_all = True  # Whether all files of the index are compared.
        self._found: list[str] = []  # Those of them that are there.
        # New and changed files, and those with damaged features; what the index has of them.
        self._pending: list[FoundFile] = []
        self._known: dict[str, KnownFile] = {}
        # Files of the index that are gone, by size; paths of those that were moved.
        self._missing: dict[int, list[KnownFile]] = collections.defaultdict(list)
        self._moved: set[str] = set()
        # The next commit: videos, paths that they leave, and since when they wait.
        self._batch: list[tuple[VideoRecord, VideoRead]] = []
        self._left: list[str] = []
        self._since = 0.0

    def compare(self, only: Sequence[str]) -> None:
        """Compares the index with the files of the folder, or only some; checks their features."""
        writer, folder, root = self._writer, self._folder, self._folder.absolute()
        refused = self._report.unavailable
        if only:
            given = [PurePath(reading.path_of(path)) for path in only]
            names = [str(p.relative_to(root) if p.is_relative_to(root) else p) for p in given]
            self._paths = list(dict.fromkeys(names))
            named = {path: reading.find_named(folder, path, self._timeout) for path in self._paths}
            files = [file for file in named.values() if file is not None]
        elif not folder.is_dir():  # It is gone, and its videos are to be removed.
            files = []
        else:
            files = list(reading.find_videos(folder, self._timeout, self._report.bad, refused))
        known = {file.path: file for file in writer.files(self._paths)}
        below = tuple(f"{name}/" for name in refused)
        self._has_all = not only and not below
        known = {path: file for path, file in known.items() if not path.startswith(below)}
        if not (only or known or files or refused):
            raise UserError(f"no video in {folder} (looked for {' '.join(VIDEO_SUFFIXES)})")
        for path in self._paths or ():
            if path not in known and named[path] is None:
                raise UserError(f"{path}: neither {folder} nor the index has such a video")
            if not self._is_ours(path):
                raise UserError(f"{path} is not in the shard of the index")
        for file in files:
            if self._is_ours(file.path):
                self._found.append(file.path)
                self._compare(known.pop(file.path, None), file)
        for path in sorted(known):
            self._compare(known[path], None)

    def _is_ours(self, path: str) -> bool:
        shard = self._writer.header.get("shard")
        return shard is None or is_in_shard(path, shard)

    def _compare(self, known: KnownFile | None, file: FoundFile | None) -> None:
        """Compares what the index has of a file with the file; None: it is not there."""
        if known is None:
            self._pending.append(file)
            return
        try:
            known.segment.verify(known.row)
            is_damaged = False
        except ValueError:
            is_damaged, known = True, known._replace(sha256="")  # No file takes over its features.
        if file is None:
            self._missing[known.size].append(known)
            return
        is_changed = (known.size, known.mtime_ns) != (file.size, file.mtime_ns)
        if is_damaged or is_changed or 0 < known.allowed < file.allowed:
            self._known[known.path] = known
            self._pending.append(file)
        else:
            self._report.unchanged += 1

    def check_mounted(self) -> None:
        """Refuses to remove most of an index; a file whose size a new one has may have moved."""
        new = collections.Counter(f.size for f in self._pending if f.path not in self._known)
        lost = sum(max(0, len(files) - new[size]) for size, files in self._missing.items())
        total = self._report.unchanged + len(self._known) + sum(map(len, self._missing.values()))
        is_mounted = lost <= total / 2 if self._paths is None else any(self._folder.iterdir())
        if lost and not is_mounted:
            raise UserError(
                f"{lost} of the {total} files of the index {self._writer.directory} are not in"
                f" {self._folder}: is it the right folder, and mounted? pruning removes them"
            )

    def run(self, cluster: "RayCluster | None") -> IndexReport:
        writer, report, total = self._writer, self._report, len(self._pending)
        work, videos = writer.spool_file(text_index.FILE), self._paths or self._found
        report.transcripts, report.bad_transcripts = text_index.update_text(
            writer.directory, work, self._folder, videos, is_all=self._has_all
        )
        reads = zip(self._pending, self._read(cluster), strict=True)
        shown = tqdm(
            reads, desc="indexing", total=total, unit="video", disable=self._is_silent or not total
        )
        for number, (file, read) in enumerate(shown, start=1):
            writer.show_progress(number, total)
            self._take(file, read)
        self._store()
        missing = [file.path for files in self._missing.values() for file in files]
        writer.put([], [path for path in missing if path not in self._moved])
        writer.merge(light=self._paths is not None)
        report.moved, report.removed = len(self._moved), len(missing) - len(self._moved)
        report.bad = writer.errors(self._paths) | report.bad
        report.windows, report.nbytes = writer.windows(), writer.nbytes()
        return report

    def _read(self, cluster: "RayCluster | None") -> Iterator[VideoRead | WorkerFailure]:
        read = functools.partial(map_in_processes, reading.read_video)
        if cluster is not None and self._pending:
            example = reading.file_of(self._folder, self._pending[0].path)
            cluster.check({"--index": self._writer.directory}, example, _PACKAGES, ["drl_jax"])
            read = functools.partial(cluster.map, reading.read_video_on_node)
        sampling = sampling_of(self._model, self._writer.header["fps"])
        folder = self._folder.absolute()  # The nodes of a cluster have other working directories.
        calls = []
        for number, file in enumerate(self._pending):
            # A video that took too long, or has damaged features, has no hash: it is decoded again.
            contents = frozenset(known.sha256 for known in self._like(file)) - {""}
            spool = self._writer.spool_file(number).absolute()
            calls.append((reading.file_of(folder, file.path), contents, sampling, spool))
        return read(calls, timeout=[file.allowed for file in self._pending], ahead=_AHEAD)

    def _like(self, file: FoundFile) -> list[KnownFile]:
        """What the index has of a file, and of those of its size that are gone."""
        known = self._known.get(file.path)
        return [*([known] if known else []), *self._missing.get(file.size, ())]

    def _take(self, file: FoundFile, read: VideoRead | WorkerFailure) -> None:
        allowed = 0.0
        if isinstance(read, WorkerFailure):
            if read.timed_out:  # Stored with the time that it had.
                allowed = file.allowed
            elif read.is_passing:
                self._report.unavailable[file.path] = read.reason
                return
            read = VideoRead(error=read.reason)
        known = None
        if read.is_known:
            known = next(known for known in self._like(file) if known.sha256 == read.sha256)
        if known is None:
            fields = (read.sha256, read.error, allowed, read.duration, read.arrays)
            record = VideoRecord(*file[:3], *fields)
        else:
            stored = known.segment.read(known.row)
            # Its size, too: a file that is replaced while it is read has that of before.
            record = stored._replace(path=file.path, size=file.size, mtime_ns=file.mtime_ns)
        if known is None or known.path in self._moved:  # There, by a file with the same content.
            if not record.error:
                is_changed = file.path in self._known
                self._report.changed += is_changed
                self._report.added += not is_changed
        elif known.path == file.path:  # Only its times have changed.
            self._report.unchanged += 1
        else:
            self._moved.add(known.path)
            self._left.append(known.path)
        if not self._batch:
            self._since = time.monotonic()
        self._batch.append((record, read))
        is_full = sum(len(r.windows) for _, r in self._batch) >= self._model.config.eval.batch_size
        if is_full or time.monotonic() - self._since > _STORED_EVERY:
            self._store()

    @functools.cached_property
    def _banks(self) -> list[Features]:
        return encoding.encode_banks(self._model, self._writer.directory, self._writer.header)

    def _store(self) -> None:
        reads = [read for _, read in self._batch]
        banks = self._banks if any(read.windows for read in reads) else []
        encoded = encoding.encode_for_index(self._model, self._writer.header, banks, reads)
        records = [
            record._replace(arrays={**record.arrays, **arrays})
            for (record, _), arrays in zip(self._batch, encoded, strict=True)
        ]
        self._writer.put(records, self._left)
        self._writer.merge(light=True)
        for read in reads:
            if read.spooled is not None:
                with contextlib.suppress(OSError):
                    read.spooled.unlink(missing_ok=True)
        self._batch, self._left = [], []
