"""Creates and updates the index of a folder of videos."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.models.interactions import Features
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes
from drl_jax.search.calibration import BANK_ARRAY, bank_of, bank_similarity
from drl_jax.search.encoding import encode_reads
from drl_jax.search.format_2 import made_with
from drl_jax.search.hubness import HUBNESS_ARRAY, check_bank, hubness_of, read_bank, write_bank
from drl_jax.search.progress import ProgressFile
from drl_jax.search.reading import VideoRead, read_video
from drl_jax.search.rows import IndexedVideo, SearchIndexError
from drl_jax.search.video_files import find_videos, is_outdated, is_text, names_of_no_files
from drl_jax.search.writer import IndexWriter

# Videos are stored at least this often, seconds: a kill loses no more work.
_STORED_EVERY = 15.0
# Videos that a worker may read ahead; a long one waits in a file as large as its frames.
_AHEAD = 2


@dataclasses.dataclass
class IndexReport:
    """Result of an update.

    Attributes:
      added: number of new files.
      changed: number of files with changed content, or whose features were damaged.
      moved: number of files that were renamed or moved.
      removed: number of files that were deleted.
      unchanged: number of other files.
      bad: why files cannot be searched, by path; of all files, also unchanged ones.
      skipped: names of videos that are no files: links to nothing, pipes, devices.
      seconds: length of the videos that were decoded.
      windows: number of all windows.
      nbytes: size of the stored features.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    removed: int = 0
    unchanged: int = 0
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    windows: int = 0
    nbytes: int = 0


def update_index(
    model: RetrievalModel,
    videos: Path,
    directory: Path,
    *,
    storage: str = "bfloat16",
    timeout: float = 300.0,
    prune: bool = False,
    bank: Sequence[str] = (),
) -> IndexReport:
    """Updates an index to the files of a folder; decodes only new and changed files.

    Features are stored every few seconds: after an interruption, the same call continues. A file
    with the content of one that is gone takes over its features. A video whose features are damaged
    is decoded again.

    Args:
      model: encodes the videos.
      videos: folder of the videos, searched recursively. That of an existing index may have been
        moved.
      directory: of the index; created if it does not exist.
      storage: how features are stored, one of `drl_jax.search.STORAGES`.
      timeout: seconds for decoding one video, and one more for each MB of its file. A video that
        took longer is tried again when this is larger.
      prune: remove files that are gone also if they are most of the index.
      bank: captions of other videos, to rank without hubs (`hubness.py`); those of an existing
        index need not be given again.

    Raises:
      UserError: the folder does not exist, there is no video, most of the files are gone, or the
        index is of another model, folder, storage or bank.
    """
    if not videos.is_dir():
        raise UserError(f"no directory {videos}; --videos names the folder of the videos")
    with IndexWriter(directory) as writer:
        writer.check_database()
        _check_header(writer, model, videos, storage, bank)
        known = {video.path: video for video in writer.videos()}
        found = {video.path: video for video in find_videos(videos, timeout)}
        misnamed = [path for path in found if not is_text(path)]
        for path in misnamed:
            del found[path]
        if not found and not known:
            raise UserError(f"no video in {videos} (looked for {' '.join(VIDEO_SUFFIXES)})")
        update = _Update(writer, model, videos, known, found)
        gone = len(update.missing)
        if gone > len(known) / 2 and not prune and not update.may_have_moved():
            raise UserError(
                f"{gone} of the {len(known)} videos of the index {directory} are not in {videos}:"
                " is it the right folder, and mounted? --prune removes them from the index"
            )
        return update.run(misnamed)


class _Update:
    """One update of an index."""

    def __init__(
        self,
        writer: IndexWriter,
        model: RetrievalModel,
        folder: Path,
        known: Mapping[str, IndexedVideo],
        found: Mapping[str, IndexedVideo],
    ):
        """Compares the index with the folder.

        Args:
          writer: open for writing.
          model: encodes videos.
          folder: of the videos.
          known: videos of the index by path.
          found: files by path, with the seconds that decoding may take.
        """
        self.writer, self.model, self.folder, self.known = writer, model, folder, known
        self.report = IndexReport()
        self.missing = {path: known[path] for path in sorted(known.keys() - found.keys())}
        damaged = writer.damaged_videos(list(known.values()))
        self.pending = [
            video
            for path, video in found.items()
            if path not in known or path in damaged or is_outdated(known[path], video)
        ]
        self.report.unchanged = len(found) - len(self.pending)
        self.damaged = damaged
        # Gone files whose features a file of the same content may take over.
        self._movable = {path: gone for path, gone in self.missing.items() if path not in damaged}
        # The banks of captions, encoded.
        self._bank: Features | None = None
        self._hubness_bank: Features | None = None
        # Reads that are not stored yet.
        self._unstored: list[tuple[IndexedVideo, VideoRead]] = []
        self._stored_at = time.monotonic()

    def may_have_moved(self) -> bool:
        """Whether each missing file has one of its size among the new ones."""
        new = [video.size for video in self.pending if video.path not in self.known]
        for video in self.missing.values():
            if video.size not in new:
                return False
            new.remove(video.size)
        return True

    def run(self, misnamed: list[str]) -> IndexReport:
        """Reads, encodes and stores what has changed."""
        calls = [self._call(number, video) for number, video in enumerate(self.pending)]
        allowed = [video.allowed for video in self.pending]
        reads = map_in_processes(read_video, calls, timeout=allowed, ahead=_AHEAD)
        shown = tqdm(
            zip(self.pending, reads, strict=True),
            desc="indexing",
            total=len(self.pending),
            unit="video",
            disable=not self.pending,
        )
        with ProgressFile(self.writer.directory, len(self.pending)) as progress:
            for number, (video, read) in enumerate(shown, start=1):
                self._take(video, read)
                progress.update(number)
            self._flush()
        self.writer.remove(list(self.missing))
        self.report.removed = len(self.missing)
        self.writer.compact()
        stored = self.writer.videos()
        self.report.bad = {video.path: video.error for video in stored if video.error}
        self.report.bad |= {
            ascii(path)[1:-1]: "its name is not UTF-8; rename it" for path in misnamed
        }
        self.report.skipped = names_of_no_files(self.folder)
        self.report.windows = sum(len(video.windows) for video in stored)
        self.report.nbytes = self.writer.nbytes()
        return self.report

    def _call(self, number: int, video: IndexedVideo) -> tuple:
        """The arguments of `read_video`."""
        known = self.known.get(video.path)
        digests = {gone.sha256 for gone in self._movable.values() if gone.size == video.size}
        # A video that took too long is decoded again, and so is one with damaged features.
        if known is not None and not known.allowed and video.path not in self.damaged:
            digests.add(known.sha256)
        config = self.model.config.data
        spool = self.writer.spool_file(number)
        return (
            *(self.folder / video.path, frozenset(digests - {""}), config.max_frames),
            *(self.model.frame_form, spool),
        )

    def _take(self, video: IndexedVideo, read: VideoRead | WorkerFailure) -> None:
        """Stores a file that was read, or keeps it for the next batch."""
        if isinstance(read, WorkerFailure):
            allowed = video.allowed if read.timed_out else 0.0
            self._unstored.append(
                (dataclasses.replace(video, allowed=allowed), VideoRead("", read.reason))
            )
        elif read.failure:
            raise SearchIndexError(
                f"cannot write to the index {self.writer.directory} ({read.failure}); fix this,"
                " then rerun the command to continue"
            )
        elif read.is_known:
            self._take_known(video, read.sha256)
        else:
            self._unstored.append((dataclasses.replace(video, allowed=0.0), read))
            self.report.seconds += read.duration
        waiting = sum(len(read.windows) for _, read in self._unstored)
        late = time.monotonic() - self._stored_at > _STORED_EVERY
        if late or waiting >= self.model.config.eval.batch_size:
            self._flush()

    def _take_known(self, video: IndexedVideo, sha256: str) -> None:
        known = self.known.get(video.path)
        if known is not None and known.sha256 == sha256:  # Only its modification time changed.
            self.writer.touch(video)
            self.report.unchanged += 1
            return
        gone = next((gone for gone in self._movable.values() if gone.sha256 == sha256), None)
        if gone is None:  # Two new files have the content of one that is gone.
            read = read_video(*self._call(len(self.pending), video))
            self._take(video, read)
            return
        self.writer.rename(gone.path, video)
        del self.missing[gone.path], self._movable[gone.path]
        self.report.moved += 1

    def _flush(self) -> None:
        """Encodes and stores the videos that were read."""
        batch, self._unstored = self._unstored, []
        self._stored_at = time.monotonic()
        if not batch:
            return
        records, strips = [], {}
        for video, read in batch:
            if video.path in self.known:
                self.report.changed += 1
            else:
                self.report.added += 1
            records.append(
                dataclasses.replace(
                    video,
                    sha256=read.sha256,
                    error=read.error,
                    times=read.times,
                    windows=read.windows,
                    duration=read.duration,
                )
            )
            strips[video.path] = list(read.strips)
        self.writer.put(records, self._encoded([read for _, read in batch]), strips)

    def _encoded(self, reads: list[VideoRead]) -> Features:
        """Features of all windows, in order."""
        features = encode_reads(self.model, reads)
        if not features:
            return {}
        header, of_banks = self.writer.header, {}
        # Indexes of earlier versions have no bank.
        if sentences := header.get("bank"):
            if self._bank is None:
                self._bank = self.model.encode_text(sentences)
            of_banks[BANK_ARRAY] = bank_similarity(self.model, self._bank, features)
        if "hubness" in header:
            if self._hubness_bank is None:
                captions = read_bank(self.writer.directory, header)
                self._hubness_bank = self.model.encode_text(captions)
            of_banks[HUBNESS_ARRAY] = hubness_of(self.model, header, self._hubness_bank, features)
        return features | of_banks


def _check_header(
    writer: IndexWriter, model: RetrievalModel, videos: Path, storage: str, bank: Sequence[str]
) -> None:
    """Writes the header of a new index, or checks that an index matches; upgrades old formats."""
    folder, header = str(videos.resolve()), writer.header
    if not header:
        writer.update_header(
            source=model.source,
            fingerprint=model.fingerprint,
            videos=folder,
            storage=storage,
            bank=bank_of(model.config),
            **({"hubness": write_bank(writer.directory, bank)} if bank else {}),
        )
        return
    # A folder that is not there any more may have been moved.
    is_folder = header["videos"] == folder or not Path(header["videos"]).is_dir()
    for matches, other in (
        (made_with(header, model), "model"),
        (is_folder, f"folder, {header['videos']}"),
        (header["storage"] == storage, f"storage, {header['storage']}"),
    ):
        if not matches:
            raise SearchIndexError(
                f"the index {writer.directory} was made with another {other}; give another --index,"
                " or delete it"
            )
    if bank:
        check_bank(writer.directory, header, bank)
    if not header["fingerprint"] or header["videos"] != folder:
        writer.update_header(fingerprint=model.fingerprint, videos=folder)
