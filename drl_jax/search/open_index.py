"""One state of an index: its videos and what it stores of them."""

import bisect
import contextlib
import dataclasses
import functools
import heapq
import io
import itertools
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
from PIL import Image

from drl_jax.models.interactions import Features
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search import STRIP_FRAMES, index_file, text_index
from drl_jax.search.encoding import HUBNESS_ARRAY, SCALE_WINDOWS, Correction, dequantize
from drl_jax.search.engine import BLOCKS, VECTORS, Gallery
from drl_jax.search.filters import Filters, Listing, list_videos, natural_key, passing
from drl_jax.search.reading import file_of
from drl_jax.search.segments import Listed, SearchIndexError, Segment, VideoRecord
from drl_jax.search.transcripts import Cue
from drl_jax.search.windows import Window

# The number of the segment of a video, and its row there.
Place: TypeAlias = tuple[int, int]
# Arrays of windows that queries are not compared with.
_OTHERS = ("span", "frames", "bank_similarity", HUBNESS_ARRAY)
# Windows that are checked before an index is open: a few tenths of a second.
_AT_ONCE = 10_000
# 2^64 divided by the golden ratio: multiples of it are evenly spread.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class EmptyIndexError(SearchIndexError):
    """An index has no video that can be searched, maybe not yet."""


@dataclasses.dataclass(frozen=True)
class IndexedVideo:
    """A video file of an open index; `path` is relative to its folder.

    Segment and row identify it, whatever replaces it; `slot` is that of its first window.
    """

    path: str
    slot: int
    segment: Segment
    row: int
    record: VideoRecord = dataclasses.field(compare=False, repr=False)

    @property
    def duration(self) -> float:
        return self.record.duration

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """Times of the sampled frames, seconds."""
        return tuple(self.record.arrays["frame.time"].tolist())

    @functools.cached_property
    def windows(self) -> tuple[Window, ...]:
        spans, frames = (self.record.arrays[f"window.{name}"] for name in ("span", "frames"))
        return tuple(
            Window(start, end, tuple(numbers[numbers >= 0].tolist()))
            for (start, end), numbers in zip(spans.tolist(), frames, strict=True)
        )

    def thumbnails(self, frames: Sequence[int]) -> bytes:
        """A JPEG file with thumbnails of some of its frames side by side."""
        with _reported(self.segment):
            strips = {n: self.record.strip(n) for n in {f // STRIP_FRAMES for f in frames}}
        if list(frames) == list(range(len(self.times))) and len(strips) == 1:
            return strips[0]
        pictures = []
        for frame in frames:
            with Image.open(io.BytesIO(strips[frame // STRIP_FRAMES])) as strip:
                side, column = strip.height, frame % STRIP_FRAMES
                pictures.append(strip.crop((column * side, 0, (column + 1) * side, side)))
        file = io.BytesIO()
        Image.fromarray(np.concatenate(pictures, axis=1)).save(file, "JPEG", quality=85)
        return file.getvalue()

    @property
    def slots(self) -> np.ndarray:
        """int64 [W], of its windows."""
        return np.arange(self.slot, self.slot + len(self.record.arrays["window.span"]))


class Videos(Sequence[IndexedVideo]):
    """Videos of an index in the natural order of their paths; each is read when it is accessed."""

    def __init__(self, index: "OpenIndex", listing: Listing):
        self._index, self.listing = index, listing

    @functools.cached_property
    def valid(self) -> np.ndarray:
        """bool [all slots], the windows of these videos."""
        segments, rows = (self.listing[name].to_numpy() for name in ("segment", "row"))
        chosen = [np.zeros(len(one.gone), bool) for one in self._index.segments]
        for number, videos in enumerate(chosen):
            videos[rows[segments == number]] = True
        return self._index.windows_of(chosen)

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, which: int | slice) -> IndexedVideo | list[IndexedVideo]:
        if isinstance(which, slice):
            return [self[number] for number in range(*which.indices(len(self)))]
        segment, row = (self.listing[name][which].as_py() for name in ("segment", "row"))
        return self._index.video(segment, row)


class OpenIndex:
    """One state of an index. Safe to use from several threads.

    Attributes:
      version: `index_version` before it was opened.
      header: what the index was made with; of a joined index, that of its first part.
      folder: of the videos; of a joined index, the one that has those of all parts.
      segments: of all parts, with slots in this order.
      valid, gallery: bool [S], windows of videos that can be searched; these windows.
      count, unsearchable_count: numbers of these videos and of the other files.
    """

    def __init__(self, directory: Path, model: RetrievalModel, previous: "OpenIndex | None" = None):
        """Opens the segments that a previous state has not, and checks them (see `check`)."""
        self.directory, self.model = directory, model
        self.version = index_file.index_version(directory)
        for shard, version in self.version.items():
            if not version:
                raise SearchIndexError(
                    f"the index {directory} joins the shard {shard}, which is not there: it was"
                    " moved or deleted, or is not mounted; bring it back, or join the shards again"
                    f" with: python -m drl_jax.search join --index={directory} SHARD SHARD ..."
                )
        known = [one.segment for one in previous.segments] if previous else []
        self._parts = [index_file.IndexPart(part, known) for part in self.version]
        index_file.check_alike(self._parts)
        self.header = self._parts[0].header
        if self.header["fingerprint"] != model.fingerprint:
            raise SearchIndexError(
                f"the index {directory} was made with another model than"
                f" {' '.join(model.source.values())}; give that model, or make a new index"
            )
        self.folder = Path(os.path.commonpath([part.header["videos"] for part in self._parts]))
        self.segments: list[Listed] = []
        self._prefixes: dict[Path, str] = {}  # What the paths of a part begin with.
        first = 0
        for part in self._parts:
            prefix = f"{Path(part.header['videos']).relative_to(self.folder)}/".removeprefix("./")
            self._prefixes[part.directory] = prefix
            for one in part.listed:
                self.segments.append(dataclasses.replace(one, prefix=prefix, first_slot=first))
                first += one.segment.window_count
        self.valid = self.windows_of(one.live for one in self.segments)
        self.count = sum(int(one.live.sum()) for one in self.segments)
        self.unsearchable_count = sum(part.videos() for part in self._parts) - self.count
        if not self.count:
            why = f"has no video that can be searched ({self.unsearchable_count} cannot)"
            if (progress := self.progress()) is not None:
                read = f"{progress['done']} of {progress['total']} files are read"
                why = f"is being made ({read}), and no video is stored yet; try again in a minute"
            raise EmptyIndexError(f"the index {directory} {why}")
        parts = [_windows(one.segment.arrays) for one in self.segments]
        self.gallery = Gallery(parts, model.layout, self._small_order()).only(self.valid)
        self._damage: UserError | None = None
        self._checking = threading.Thread()
        self._closed, self._is_distinct = False, previous is not None
        self.check()

    def _small_order(self) -> np.ndarray:
        """Slots of the windows of small segments by path; equal scores are in this order."""
        paths, slots = [], [np.zeros(0, np.int64)]
        for one in self.segments:
            if (count := one.segment.window_count) < BLOCKS[-1]:
                slots.append(np.arange(one.first_slot, one.first_slot + count))
                owners = one.segment.row_of_window(np.arange(count)).tolist()
                paths += [one.prefix + one.segment.path(row) for row in owners]
        return np.concatenate(slots)[sorted(range(len(paths)), key=paths.__getitem__)]

    def windows_of(self, videos: Iterable[np.ndarray]) -> np.ndarray:
        """bool [S], the windows of some videos: bool [V] for each segment."""
        counts = [np.diff(one.segment.firsts["window"]) for one in self.segments]
        return np.concatenate([np.zeros(0, bool), *map(np.repeat, videos, counts)])

    def _verify(self) -> None:
        self._damage = None  # Files may have been repaired.
        try:
            for one in self.segments:
                with _reported(one.segment):
                    for row in np.flatnonzero(one.live & ~one.segment.verified).tolist():
                        if self._closed:
                            return
                        one.segment.verify(row)
            if not self._is_distinct:
                index_file.check_distinct(self._parts)
                self._is_distinct = True
        except UserError as error:
            self._damage = error

    def check(self) -> None:
        """Checks files, and features that are new or were written to, many of them in a thread."""
        for one in self.segments:
            with _reported(one.segment):
                one.segment.check_files()
        new = [one.live & ~one.segment.verified for one in self.segments]
        if any(videos.any() for videos in new) and not self._checking.is_alive():
            if self.windows_of(new).sum() <= _AT_ONCE:
                self._verify()
            else:  # In a daemon: a command that has its answer ends.
                self._checking = threading.Thread(target=self._verify, daemon=True)
                self._checking.start()
        if self._damage is not None:
            raise self._damage

    def close(self) -> None:
        """Ends the check: a later state has replaced this one."""
        self._closed = True

    @functools.cached_property
    def videos(self) -> Videos:
        """The videos that can be searched; listed once, and only if they are asked for."""
        rows = [np.flatnonzero(one.live) for one in self.segments]
        return Videos(self, list_videos(self.segments, rows))

    def video(self, segment: int, row: int) -> IndexedVideo:
        """The video in a row of a segment; raises a SearchIndexError if it is damaged."""
        one = self.segments[segment]
        with _reported(one.segment):
            one.segment.check_files()
            record = one.segment.read(row)
        path, slot = one.prefix + record.path, self._first_slot((segment, row))
        return IndexedVideo(path, slot, one.segment, row, record)

    def _first_slot(self, place: Place) -> int:
        one = self.segments[place[0]]
        return one.first_slot + int(one.segment.firsts["window"][place[1]])

    def place(self, slot: int) -> tuple[int, int]:
        """The segment and the row of the video that has a window."""
        number = bisect.bisect_right(self.segments, slot, key=lambda one: one.first_slot) - 1
        one = self.segments[number]
        return number, int(one.segment.row_of_window(slot - one.first_slot))

    def path_of(self, place: tuple[int, int]) -> str:
        one = self.segments[place[0]]
        return one.prefix + one.segment.path(place[1])

    def _find(self, path: str) -> tuple[int, int] | None:
        for number, one in enumerate(self.segments):
            if path.startswith(one.prefix):
                row = one.segment.find(path.removeprefix(one.prefix))
                if row is not None and one.live[row]:
                    return number, row
        return None

    def video_at(self, path: str) -> IndexedVideo | None:
        """The video with exactly this path relative to the folder, if it can be searched."""
        place = self._find(path)
        return None if place is None else self.video(*place)

    def transcripts(self) -> int:
        """How many transcripts the index has."""
        return sum(map(text_index.count_transcripts, self._prefixes))

    def find_cues(
        self, sentence: str, videos: int, most: int, among: Videos | None, path: str = ""
    ) -> tuple[dict[Place, list[Cue]], str]:
        """The best videos by what is said in them, or the one at a path, with `most` cues of each.

        The best are first. Also returns why there is no text, in one line, or "".
        """
        failures: list[str] = []
        place_of, found = functools.cache(self._find), dict[Place, list[Cue]]()
        parts = [
            text_index.find_cues(directory, prefix, sentence, path, failures)
            for directory, prefix in self._prefixes.items()
            if not path or path.startswith(prefix)
        ]
        for _, video, cue in heapq.merge(*parts, key=lambda one: one[:2]):
            place = place_of(video)
            if place is None or not (among is None or among.valid[self._first_slot(place)]):
                continue
            if place not in found and len(found) == videos:
                break
            if len(cues := found.setdefault(place, [])) < most:
                cues.append(cue)
        if not any((directory / text_index.FILE).exists() for directory in self._prefixes):
            line = "put transcripts (.srt, .vtt or .json) beside the videos, and index them again"
            failures.append(f"the index {self.directory} has no text: {line}")
        return found, "; ".join(failures)

    def unsearchable(self) -> list[tuple[str, str]]:
        files = itertools.chain(*(one.errors() for one in self.segments))
        return sorted(files, key=lambda file: natural_key(file[0]))

    def filtered(self, filters: Filters) -> Videos:
        """The videos that pass filters; raises a UserError if one of `only` is not there."""
        if not filters.only:
            return Videos(self, passing(self.videos.listing, filters))
        rows: list[list[int]] = [[] for _ in self.segments]
        for path in set(filters.only):
            if (place := self._find(path)) is None:
                raise UserError(f"no video of the index has the path {path[:200]!r}")
            rows[place[0]].append(place[1])
        return Videos(self, passing(list_videos(self.segments, rows), filters))

    @functools.cached_property
    def spread(self) -> np.ndarray:
        """Slots of SCALE_WINDOWS windows, or all; the same in a joined index as in one of all."""
        keys = [np.zeros(0, np.uint64)]
        for one in self.segments:
            digests, firsts = one.segment.table.column("sha256"), one.segment.firsts["window"]
            seeds = np.array([int(d[:15] or "0", 16) for d in digests.to_pylist()], np.uint64)
            windows = np.arange(firsts[-1])
            owners = one.segment.row_of_window(windows)
            keys.append((seeds[owners] + (windows - firsts[owners]).astype(np.uint64)) * _GOLDEN)
        slots = np.flatnonzero(self.valid)
        order = np.argsort(np.concatenate(keys)[slots], kind="stable")
        return slots[order[:SCALE_WINDOWS]]

    def is_unchanged(self, video: IndexedVideo) -> bool:
        """Whether a file is the one that was indexed, by its size and modification time."""
        with contextlib.suppress(OSError):
            status = file_of(self.folder, video.path).stat()
            return (status.st_size, status.st_mtime_ns) == video.record[1:3]
        return False

    def biases(self, correction: Correction) -> np.ndarray:
        """What a correction for hubs subtracts: float32 [S]; a UserError if it is not stored."""
        if "hubness" not in self.header:
            raise SearchIndexError(
                f"the index {self.directory} has no bank of captions, which --hubness needs; make"
                " a new one with: python -m drl_jax.search index --bank=train|FILE"
            )
        columns = self.header["hubness"]["columns"]
        if correction.column not in columns:
            stored = f"the index {self.directory} has {', '.join(columns)} only"
            raise UserError(f"--hubness={correction}: {stored}")
        column, name = columns.index(correction.column), f"window.{HUBNESS_ARRAY}"
        # Segments of files that cannot be searched lack it.
        arrays = [one.segment.arrays[name] for one in self.segments if name in one.segment.arrays]
        return np.float32(correction.factor) * np.concatenate([part[:, column] for part in arrays])

    def progress(self) -> dict[str, int] | None:
        """How many files, `done` of `total`, updates of the index have read; None without one."""
        return index_file.read_progress(*self.version)


@contextlib.contextmanager
def _reported(segment: Segment) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise index_file.failure(segment.directory.parents[1], error) from error


def stored_windows(video: IndexedVideo) -> Features:
    """The arrays of the windows of a video that the interaction compares, features float32."""
    rows = _windows(video.record.arrays, (*_OTHERS, *VECTORS))
    return {name: np.asarray(array) for name, array in jax.device_get(dequantize(rows)).items()}


def _windows(arrays: Features, without: Sequence[str] = _OTHERS) -> Features:
    """Arrays of windows, by their names without the axis."""
    names = {name: name.removeprefix("window.") for name in arrays if name.startswith("window.")}
    return {name: arrays[key] for key, name in names.items() if name not in without}
