"""One state of an index and what it stores: videos, features, pictures."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search.calibration import BANK_ARRAY
from drl_jax.search.filters import Filters, passing
from drl_jax.search.hubness import Correction
from drl_jax.search.joined import check_alike, check_present, common_folder, part_versions
from drl_jax.search.listing import Listing
from drl_jax.search.part import IndexPart
from drl_jax.search.progress import Progress, progress_of
from drl_jax.search.quantization import dequantize
from drl_jax.search.rows import IndexedVideo, SearchIndexError
from drl_jax.search.slots import PART_SLOTS, take_rows
from drl_jax.search.store import Store
from drl_jax.search.thumbnails import thumbnails
from drl_jax.search.videos import IndexedVideos, VideosPart, slots_of


class OpenIndex:
    """One state of an index.

    Attributes:
      directory: of the index.
      model: the model of the index.
      parts: the shards that it joins, or itself alone.
      header: what the index was made with; of a joined index, that of its first part.
      folder: folder of the videos; of a joined index, the one that has those of all parts.
      videos: the videos that can be found.
      unsearchable_count: number of the other files.
      biases: for each part, what the correction for hubs subtracts, float32 [S]; None: nothing.
    """

    def __init__(
        self,
        directory: Path,
        model: RetrievalModel,
        previous: "OpenIndex | None",
        correction: Correction | None,
        versions: Mapping[Path, tuple[int, ...]] | None,
    ):
        """Reads the slots of the videos, and maps the arrays; see `IndexSnapshot`."""
        self.directory, self.model = directory, model
        versions = part_versions(directory) if versions is None else versions
        known = [] if previous is None else previous.parts
        self.parts = _open_parts(directory, versions, model, known)
        headers = [part.header for part in self.parts]
        check_alike([(part.directory, part.header) for part in self.parts])
        self.folder, prefixes = common_folder(headers)
        self.header = {**headers[0], "videos": str(self.folder)}
        self.videos = _videos_of(self.parts, prefixes)
        self.unsearchable_count = sum(part.unsearchable_count for part in self.parts)
        if not self.videos:
            progress = self.progress()
            raise SearchIndexError(
                f"the index {directory} has no video that can be searched"
                f" ({self.unsearchable_count} cannot)"
                if progress is None
                else f"the index {directory} is being made ({progress.done} of {progress.total}"
                " files are read), and no video is stored yet; try again in a few seconds"
            )
        self.biases = None if correction is None else [p.biases(correction) for p in self.parts]

    # ------------------------------------------------------------------ features

    def bank_row(self, slot: int) -> np.ndarray | None:
        """The row of BANK_ARRAY of a window; None if an earlier version made the index."""
        number, row = divmod(slot, PART_SLOTS)
        bank = self.parts[number].of_banks.get(BANK_ARRAY)
        return None if bank is None else bank[row]

    def check_files(self) -> None:
        """Checks that no mapped file was cut.

        Raises:
          SearchIndexError: one was.
        """
        for part in self.parts:
            part.check_files()

    def stored(self, videos: Sequence[IndexedVideo]) -> Features:
        """The arrays of indexed videos, one row per window, features float32."""
        return self._stored_rows(slots_of(videos))

    def stored_windows(self, windows: Sequence[tuple[IndexedVideo, int]]) -> Features:
        """The arrays of windows, given as videos and numbers; features float32."""
        return self._stored_rows([video.slot + number for video, number in windows])

    def biases_of_windows(self, windows: Sequence[tuple[IndexedVideo, int]]) -> np.ndarray:
        """What the correction for hubs subtracts from the scores of windows: float32 [W]."""
        slots = [video.slot + number for video, number in windows]
        return take_rows([{"bias": biases} for biases in self.biases], slots)["bias"]

    def _stored_rows(self, slots: Sequence[int]) -> Features:
        rows = take_rows([part.arrays for part in self.parts], slots)
        return {name: np.asarray(array) for name, array in jax.device_get(dequantize(rows)).items()}

    def unsearchable(self) -> list[IndexedVideo]:
        """The files that cannot be searched, with the reason in `error`, by their paths."""
        found = []
        for number, part in enumerate(self.videos.parts):
            with Store(part.directory) as store:
                found += [part.shown(video, number) for video in store.unsearchable()]
        return sorted(found, key=lambda video: video.path)

    def progress(self) -> Progress | None:
        """How far the processes are that update the index; None if there are none."""
        return progress_of(part.directory for part in self.parts)

    def video_at(self, path: str) -> IndexedVideo | None:
        """The video with exactly this path relative to the folder, if it can be searched."""
        return self.videos.at_path(path)

    @functools.cached_property
    def listing(self) -> Listing:
        """What filters need of all videos; read once, and only if it is asked for."""
        return self.videos.listing()

    def filtered(self, filters: Filters) -> IndexedVideos:
        """The videos that pass filters.

        Raises:
          UserError: no video has one of the paths of `only`.
        """
        listing = self._listing_of(filters.only) if filters.only else self.listing
        return self.videos.only(listing.slots[passing(listing, filters)])

    def _listing_of(self, paths: Sequence[str]) -> Listing:
        videos = []
        for path in paths:
            video = self.video_at(path)
            if video is None:
                raise UserError(f"no video of the index has the path {path[:200]!r}")
            videos.append(video)
        return Listing.of_videos(videos)

    def is_unchanged(self, video: IndexedVideo) -> bool:
        """Whether a file is the one that was indexed, by its size and modification time."""
        try:
            status = (self.folder / video.path).stat()
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (video.size, video.mtime_ns)

    def thumbnails(self, video: IndexedVideo, window: int = 0) -> bytes:
        """A JPEG file with the frames of a window of an indexed video side by side."""
        return self.frames_of(video, video.windows[window].frames)

    def frames_of(self, video: IndexedVideo, frames: Sequence[int]) -> bytes:
        """A JPEG file with thumbnails of some frames of an indexed video side by side."""
        part = self.videos.parts[video.slot // PART_SLOTS]
        with Store(part.directory) as store:
            return thumbnails(store, part.stored(video), frames)


def _open_parts(
    directory: Path,
    versions: Mapping[Path, tuple[int, ...]],
    model: RetrievalModel,
    previous: Sequence[IndexPart],
) -> list[IndexPart]:
    """Opens the parts of an index; those of an earlier state that have not changed stay open."""
    known = {part.directory: part for part in previous}
    parts = []
    for part, version in versions.items():
        check_present(directory, part)
        if part in known and version and known[part].version == version:
            parts.append(known[part])
        else:
            parts.append(IndexPart(part, version, model))
    return parts


def _videos_of(parts: Sequence[IndexPart], prefixes: Sequence[str]) -> IndexedVideos:
    """The videos of all parts, with the slots of the index."""
    firsts = [part.videos.first_slots + n * PART_SLOTS for n, part in enumerate(parts)]
    sources = zip(parts, prefixes, strict=True)
    return IndexedVideos(
        tuple(VideosPart(p.directory, p.header["generation"], prefix) for p, prefix in sources),
        np.concatenate(firsts),
        np.concatenate([part.videos.counts for part in parts]),
    )
