"""One state of an index: its videos and what it stores of them."""

import bisect
import dataclasses
import functools
import io
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import jax
import numpy as np
from PIL import Image

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search import STRIP_FRAMES
from drl_jax.search.encoding import HUBNESS_ARRAY, SCALE_WINDOWS, Correction, dequantize
from drl_jax.search.engine import BLOCKS, VECTORS, Gallery
from drl_jax.search.filters import Filters, Listing, passing
from drl_jax.search.index_file import (
    Part,
    Progress,
    check_alike,
    check_distinct,
    common_folder,
    failure,
    index_version,
    open_part,
    progress_of,
)
from drl_jax.search.segments import SearchIndexError, Segment, VideoRecord
from drl_jax.search.windows import Window

# Arrays of windows that the interaction does not compare.
_OTHERS = ("span", "frames", "bank_similarity", HUBNESS_ARRAY)
# Windows that are checked before an index is open: a few tenths of a second.
_AT_ONCE = 10_000
# 2^64 divided by the golden ratio: multiples of it are evenly spread.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class _Listed(NamedTuple):
    """A segment of an open index.

    Attributes:
      segment: open.
      live: bool [V], videos that can be searched.
      prefix: what their paths have before those of the segment; "" but for joined indexes.
      first_slot: the slot of its first window.
    """

    segment: Segment
    live: np.ndarray
    prefix: str
    first_slot: int


@dataclasses.dataclass(frozen=True)
class IndexedVideo:
    """A video file of an open index.

    Attributes:
      path: relative to the folder of the index.
      slot: the number of its first window among all windows of the index; -1 with an error.
      segment: that has it. Segment and row are what identifies it, whatever replaces it later.
      row: in the segment.
      record: what is stored.
    """

    path: str
    slot: int
    segment: Segment
    row: int
    record: VideoRecord = dataclasses.field(compare=False, repr=False)

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.record.duration

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """Times of the sampled frames, seconds."""
        return tuple(self.record.arrays["frame.time"].tolist())

    @functools.cached_property
    def windows(self) -> tuple[Window, ...]:
        """Its coarse windows."""
        spans, frames = (self.record.arrays[f"window.{name}"] for name in ("span", "frames"))
        return tuple(
            Window(start, end, tuple(numbers[numbers >= 0].tolist()))
            for (start, end), numbers in zip(spans.tolist(), frames, strict=True)
        )

    @property
    def slots(self) -> np.ndarray:
        """int64 [W], of its windows."""
        return np.arange(self.slot, self.slot + len(self.record.arrays["window.span"]))


class Videos(Sequence[IndexedVideo]):
    """Videos of an index in the order of their paths; each is read when it is accessed.

    Attributes:
      valid: bool [all slots], the windows of these videos.
    """

    def __init__(self, index: "OpenIndex", listing: Listing | None):
        """`listing`: of these videos; None: all, which are listed when they are needed."""
        self._index, self._chosen = index, listing

    @functools.cached_property
    def _listing(self) -> Listing:
        return self._index.listing if self._chosen is None else self._chosen

    @functools.cached_property
    def valid(self) -> np.ndarray:
        if self._chosen is None:
            return self._index.valid
        valid = np.zeros(len(self._index.valid), bool)
        for segment, row in zip(self._chosen.segments, self._chosen.rows, strict=True):
            listed = self._index.segments[segment]
            first, last = listed.segment.firsts["window"][row : row + 2] + listed.first_slot
            valid[first:last] = True
        return valid

    def __len__(self) -> int:
        return self._index.count if self._chosen is None else len(self._chosen.paths)

    @overload
    def __getitem__(self, which: int) -> IndexedVideo: ...
    @overload
    def __getitem__(self, which: slice) -> list[IndexedVideo]: ...

    def __getitem__(self, which: int | slice) -> IndexedVideo | list[IndexedVideo]:
        if isinstance(which, slice):
            return [self[number] for number in range(*which.indices(len(self)))]
        listing = self._listing
        return self._index.video(int(listing.segments[which]), int(listing.rows[which]))


class OpenIndex:
    """One state of an index. Safe to use from several threads.

    Attributes:
      directory: of the index.
      model: the model of the index.
      version: `index_version` before it was opened.
      header: what the index was made with; of a joined index, that of its first part.
      folder: folder of the videos; of a joined index, the one that has those of all parts.
      segments: of all parts, which all have slots in this order.
      valid: bool [S], slots of windows of videos that can be searched.
      count: number of these videos.
      unsearchable_count: number of the other files.
      gallery: their windows.
    """

    def __init__(self, directory: Path, model: RetrievalModel, previous: "OpenIndex | None" = None):
        """Maps the files, and checks the features of a small index; those of others in a thread.

        Args:
          directory: of the index.
          model: the model that it was made with.
          previous: an earlier state, whose open segments are used.

        Raises:
          SearchIndexError: there is no index, no video to search, it is damaged, or the model is
            another one.
          Unavailable: a file cannot be read.
        """
        self.directory, self.model = directory, model
        self.version = index_version(directory)
        known = [] if previous is None else [listed.segment for listed in previous.segments]
        self._check_present()
        self._parts = [open_part(part, known) for part in self.version]
        check_alike(self._parts)
        headers = [part.header for part in self._parts]
        self.header, (self.folder, prefixes) = headers[0], common_folder(headers)
        if self.header["fingerprint"] != model.fingerprint:
            raise SearchIndexError(
                f"the index {directory} was made with another model than"
                f" {' '.join(model.source.values())}; give the model of the index, or make a new"
                " index"
            )
        self.segments = list(_listed(self._parts, prefixes))
        self.valid = np.concatenate(
            [np.repeat(one.live, np.diff(one.segment.firsts["window"])) for one in self.segments]
            or [np.zeros(0, bool)]
        )
        self.count = sum(int(listed.live.sum()) for listed in self.segments)
        files = sum(int((~gone).sum()) for part in self._parts for gone in part.gone)
        self.unsearchable_count = files - self.count
        if not self.count:
            raise SearchIndexError(self._why_empty())
        # In the order of all segments, so that slots are those of the gallery.
        parts = [_windows_of(listed.segment) for listed in self.segments]
        self.gallery = Gallery(parts, model.layout, self._small_order()).only(self.valid)
        self._damage: Exception | None = None
        self._checking: threading.Thread | None = None
        self._closed = False
        self._verify_all(is_first=previous is None)
        self.check()

    def _check_present(self) -> None:
        for part, version in self.version.items():
            if not version:
                raise SearchIndexError(
                    f"the index {self.directory} joins the shard {part}, which is not there: it"
                    " was moved or deleted, or its disk is not mounted; bring it back, or join"
                    " the shards again with: python -m drl_jax.search join"
                    f" --index={self.directory} SHARD SHARD ..."
                )

    def _why_empty(self) -> str:
        progress = self.progress()
        if progress is None:
            return (
                f"the index {self.directory} has no video that can be searched"
                f" ({self.unsearchable_count} cannot)"
            )
        return (
            f"the index {self.directory} is being made ({progress.done} of {progress.total} files"
            " are read), and no video is stored yet; try again in a few seconds"
        )

    def _small_order(self) -> np.ndarray:
        """Slots of the windows of small segments by path; equal scores are in this order."""
        rows = []
        for listed in self.segments:
            counts = np.diff(listed.segment.firsts["window"])
            if counts.sum() < BLOCKS[-1]:
                slots = (listed.segment.firsts["window"][:-1] + listed.first_slot).tolist()
                paths = listed.segment.paths()
                rows += [
                    (listed.prefix + path, slot + n)
                    for path, slot, count in zip(paths, slots, counts.tolist(), strict=True)
                    for n in range(count)
                ]
        return np.array([slot for _, slot in sorted(rows)], np.int64)

    # ------------------------------------------------------------------ checks

    def _verify_all(self, *, is_first: bool = False) -> None:
        waiting = sum(
            int(np.diff(one.segment.firsts["window"])[one.live & ~one.segment.verified].sum())
            for one in self.segments
        )
        if waiting <= _AT_ONCE:
            self._verify(is_first)
        else:
            # A daemon: a command that has its answer ends.
            self._checking = threading.Thread(target=self._verify, args=(is_first,), daemon=True)
            self._checking.start()

    def _verify(self, is_first: bool) -> None:
        try:
            for listed in self.segments:
                for row in np.flatnonzero(listed.live & ~listed.segment.verified).tolist():
                    if self._closed:
                        return
                    listed.segment.verify(row)
            if is_first:
                check_distinct(self._parts)
        except (OSError, ValueError) as error:
            self._damage = _failure(listed.segment, error)
        except SearchIndexError as error:
            self._damage = error

    def check(self) -> None:
        """Checks that no file was cut or written to.

        Raises:
          SearchIndexError: the index is damaged.
        """
        try:
            for listed in self.segments:
                listed.segment.check_files()
        except (OSError, ValueError) as error:
            raise _failure(listed.segment, error) from error
        is_checking = self._checking is not None and self._checking.is_alive()
        if not is_checking and any((s.live & ~s.segment.verified).any() for s in self.segments):
            self._verify_all()  # Files were written to.
        if self._damage is not None:
            raise self._damage

    def close(self) -> None:
        """Ends the check: a later state has replaced this one."""
        self._closed = True

    # ------------------------------------------------------------------ videos

    @property
    def videos(self) -> Videos:
        """The videos that can be searched."""
        return Videos(self, None)

    def video(self, segment: int, row: int) -> IndexedVideo:
        """The video in a row of a segment.

        Raises:
          SearchIndexError: its features are damaged.
        """
        listed = self.segments[segment]
        try:
            listed.segment.check_files()
            record = listed.segment.read(row)
        except (OSError, ValueError) as error:
            raise _failure(listed.segment, error) from error
        first = int(listed.segment.firsts["window"][row])
        slot = listed.first_slot + first if record.arrays else -1
        return IndexedVideo(listed.prefix + record.path, slot, listed.segment, row, record)

    def place(self, slot: int) -> tuple[int, int]:
        """The segment and the row of the video that has a window."""
        firsts = [listed.first_slot for listed in self.segments]
        number = bisect.bisect_right(firsts, slot) - 1
        segment = self.segments[number].segment
        return number, int(segment.row_of_window(slot - firsts[number]))

    def path_of(self, place: tuple[int, int]) -> str:
        """The path of a video, without reading more of it."""
        listed = self.segments[place[0]]
        return listed.prefix + listed.segment.table.column("path")[place[1]].as_py()

    def video_at(self, path: str) -> IndexedVideo | None:
        """The video with exactly this path relative to the folder, if it can be searched."""
        for number, listed in enumerate(self.segments):
            if path.startswith(listed.prefix):
                row = listed.segment.find(path.removeprefix(listed.prefix))
                if row is not None and listed.live[row]:
                    return self.video(number, row)
        return None

    def unsearchable(self) -> list[tuple[str, str]]:
        """Path and reason of the files that cannot be searched."""
        found = []
        for listed, gone in zip(self.segments, self._gone(), strict=True):
            table = listed.segment.table
            for row in np.flatnonzero(~listed.live & ~gone).tolist():
                path, error = (table.column(name)[row].as_py() for name in ("path", "error"))
                found.append((listed.prefix + path, error))
        return sorted(found)

    def _gone(self) -> Iterator[np.ndarray]:
        for part in self._parts:
            yield from part.gone

    @functools.cached_property
    def listing(self) -> Listing:
        """What filters need of all videos, by path; read once, and only if it is asked for."""
        return Listing.of_segments([(one.segment, one.live, one.prefix) for one in self.segments])

    def filtered(self, filters: Filters) -> Videos:
        """The videos that pass filters.

        Raises:
          UserError: no video has one of the paths of `only`.
        """
        listing = self._listing_of(filters.only) if filters.only else self.listing
        return Videos(self, listing.chosen(passing(listing, filters)))

    def _listing_of(self, paths: Sequence[str]) -> Listing:
        videos = []
        numbers = {listed.segment.directory: n for n, listed in enumerate(self.segments)}
        for path in sorted(set(paths)):
            if (video := self.video_at(path)) is None:
                raise UserError(f"no video of the index has the path {path[:200]!r}")
            videos.append((path, video))
        return Listing(
            np.array([numbers[video.segment.directory] for _, video in videos]),
            np.array([video.row for _, video in videos]),
            [path for path, _ in videos],
            np.array([video.record.mtime_ns for _, video in videos]),
            np.array([video.duration for _, video in videos]),
        )

    @functools.cached_property
    def spread(self) -> np.ndarray:
        """Slots of SCALE_WINDOWS windows, or all, that depend on no more than the videos' contents.

        So a joined index has the same windows as one of all files.
        """
        keys = [np.zeros(0, np.uint64)]
        for segment, *_ in self.segments:
            digests = segment.table.column("sha256").to_pylist()
            seeds = np.array([int(digest[:15] or "0", 16) for digest in digests], np.uint64)
            counts = np.diff(segment.firsts["window"])
            numbers = np.arange(counts.sum()) - np.repeat(segment.firsts["window"][:-1], counts)
            keys.append((np.repeat(seeds, counts) + numbers.astype(np.uint64)) * _GOLDEN)
        slots = np.flatnonzero(self.valid)
        order = np.argsort(np.concatenate(keys)[slots], kind="stable")
        return slots[order[:SCALE_WINDOWS]]

    def is_unchanged(self, video: IndexedVideo) -> bool:
        """Whether a file is the one that was indexed, by its size and modification time."""
        try:
            status = (self.folder / video.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (video.record.size, video.record.mtime_ns)

    # ------------------------------------------------------------------ what is stored

    def biases(self, correction: Correction) -> np.ndarray:
        """What a correction for hubs subtracts from the similarities of windows: float32 [S].

        Raises:
          UserError: the index does not store it.
        """
        if "hubness" not in self.header:
            raise SearchIndexError(
                f"the index {self.directory} has no bank of captions, which --hubness needs; make"
                " a new one with: python -m drl_jax.search index --bank=train|FILE"
            )
        arrays = (listed.segment.arrays for listed in self.segments)
        name = f"window.{HUBNESS_ARRAY}"  # Segments of files that cannot be searched lack it.
        stored = np.concatenate([of[name] for of in arrays if name in of])
        return correction.biases(self.directory, self.header, stored)

    def progress(self) -> Progress | None:
        """How far the processes are that update the index; None if there are none."""
        return progress_of(self.version)

    def frames_of(self, video: IndexedVideo, frames: Sequence[int]) -> bytes:
        """A JPEG file with thumbnails of some frames of a video side by side.

        Raises:
          SearchIndexError: they are damaged.
        """
        try:
            numbers = sorted({frame // STRIP_FRAMES for frame in frames})
            strips = {n: video.segment.strip(video.row, n) for n in numbers}
        except ValueError as error:
            raise _failure(video.segment, error) from error
        if tuple(frames) == tuple(range(len(video.times))) and len(strips) == 1:
            return strips[0]
        pictures = []
        for frame in frames:
            with Image.open(io.BytesIO(strips[frame // STRIP_FRAMES])) as strip:
                side, column = strip.height, frame % STRIP_FRAMES
                box = (column * side, 0, (column + 1) * side, side)
                pictures.append(np.asarray(strip.crop(box)))
        file = io.BytesIO()
        Image.fromarray(np.concatenate(pictures, axis=1)).save(file, "JPEG", quality=85)
        return file.getvalue()


def _failure(segment: Segment, error: Exception) -> Exception:
    """The error of the part that has a segment."""
    return failure(segment.directory.parents[1], error)


def stored_windows(video: IndexedVideo) -> Features:
    """The arrays of the windows of a video that the interaction compares, features float32."""
    rows = _compared(video.record.arrays)
    return {name: np.asarray(array) for name, array in jax.device_get(dequantize(rows)).items()}


def _windows_of(segment: Segment) -> Features:
    """The arrays of a segment that queries are compared with."""
    arrays = _compared(segment.arrays)
    vectors = {
        name: segment.arrays[f"window.{name}"]
        for name in VECTORS
        if f"window.{name}" in segment.arrays
    }
    return arrays | vectors


def _compared(arrays) -> Features:
    names = (name.removeprefix("window.") for name in arrays if name.startswith("window."))
    return {n: arrays[f"window.{n}"] for n in names if n not in (*_OTHERS, *VECTORS)}


def _listed(parts: Sequence[Part], prefixes: Sequence[str]) -> Iterator[_Listed]:
    first = 0
    for part, prefix in zip(parts, prefixes, strict=True):
        for segment, gone in zip(part.segments, part.gone, strict=True):
            live = ~gone & (segment.column("windows") > 0)
            yield _Listed(segment, live, prefix, first)
            first += int(segment.firsts["window"][-1])
