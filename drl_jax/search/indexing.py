"""Creates and updates the index of a folder of videos."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.search.changes import Changes, changes_of_files, changes_of_folder
from drl_jax.search.encoding import WindowEncoder
from drl_jax.search.identity import check_identity
from drl_jax.search.index_batches import Batches, checked
from drl_jax.search.index_engine import IndexEngine, LocalEngine
from drl_jax.search.progress import ProgressFile
from drl_jax.search.reading import VideoRead, read_video
from drl_jax.search.rows import IndexedVideo, KnownFile
from drl_jax.search.video_files import Shard
from drl_jax.search.writer import IndexWriter

if TYPE_CHECKING:
    from drl_jax.runtime.ray_cluster import RayCluster


@dataclasses.dataclass
class IndexReport:
    """Result of an update.

    Attributes:
      added: number of new files.
      changed: number of files with changed content, or whose features were damaged.
      moved: number of files that were renamed or moved.
      removed: number of files that were deleted.
      unchanged: number of other files.
      bad: why files cannot be searched, by path; of all files that were compared, also unchanged
        ones.
      unavailable: why files could not be read this time, by path; they are not stored, and the next
        update tries again.
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
    unavailable: dict[str, str] = dataclasses.field(default_factory=dict)
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
    only: Sequence[str] = (),
    shard: Shard | None = None,
    cluster: "RayCluster | None" = None,
) -> IndexReport:
    """Updates an index to the files of a folder; decodes only new and changed files.

    With `only`, neither the folder nor the rest of the index is read: the time it takes does not
    depend on their sizes. Damage of the rest is found by the next update without `only`, and by
    the processes that search (`integrity.py`).

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
      only: adds, updates or removes only these files, paths relative to the folder; empty: all.
      shard: of a new index: only the files of this shard of the folder; that of an existing index
        need not be given again.
      cluster: decodes and encodes; None: this process and its workers do.

    Raises:
      UserError: the folder does not exist, there is no video, most of the files are gone, the
        index is of another model, folder, storage or bank, or a node of the cluster cannot work.
    """
    if not videos.is_dir():
        raise UserError(f"no directory {videos}; --videos names the folder of the videos")
    with IndexWriter(directory) as writer:
        if not only:
            writer.check_database()
        check_identity(writer, model, videos, storage, bank, shard)
        stored = writer.header.get("shard")
        shard = Shard.parse(stored) if stored else None
        if only:
            changes = changes_of_files(writer, videos, timeout, only, shard)
            is_mounted = prune or not changes.missing or any(videos.iterdir())
        else:
            writer.recount()
            changes = changes_of_folder(writer, videos, timeout, shard)
            is_few = len(changes.missing) <= writer.count() / 2
            is_mounted = prune or is_few or changes.may_have_moved()
        if not is_mounted:
            raise UserError(
                f"{len(changes.missing)} of the {writer.count()} videos of the index"
                f" {directory} are not in {videos}: is it the right folder, and mounted? --prune"
                " removes them from the index"
            )
        update = _Update(writer, model, videos, changes)
        return update.run(update.engine(cluster))


class _Update:
    """One update of an index."""

    def __init__(
        self,
        writer: IndexWriter,
        model: RetrievalModel,
        folder: Path,
        changes: Changes,
    ):
        """Reads nothing.

        Args:
          writer: open for writing.
          model: encodes videos.
          folder: of the videos.
          changes: between the index and the folder.
        """
        self.writer, self.model, self.folder, self.changes = writer, model, folder, changes
        self.known, self.missing, self.pending = changes.known, changes.missing, changes.pending
        self.damaged = changes.damaged
        self.report = IndexReport(unchanged=changes.unchanged, skipped=changes.skipped)
        # Gone files whose features a file of the same content may take over, by size and path.
        self._movable: dict[int, dict[str, KnownFile]] = collections.defaultdict(dict)
        for path, gone in self.missing.items():
            if not gone.is_damaged:
                self._movable[gone.size][path] = gone
        # Numbers of the files of long videos.
        self._numbers = itertools.count()

    def engine(self, cluster: "RayCluster | None") -> IndexEngine:
        """What reads and encodes; checks the nodes of a cluster."""
        if cluster is None or not self.pending:
            encoder = WindowEncoder(self.model, self.writer.directory, self.writer.header)
            return LocalEngine(encoder)
        # Ray is optional.
        from drl_jax.search.ray_index import RayEngine

        example = self.folder / self.pending[0].path
        return RayEngine(cluster, self.model, self.writer, example)

    def run(self, engine: IndexEngine) -> IndexReport:
        """Reads, encodes and stores what has changed."""
        reads = engine.read(*self._calls(self.pending, self._known_sha256s))
        batches = Batches(engine, self.writer, self.model.config.eval.batch_size, self._calls_again)
        shown = tqdm(
            zip(self.pending, reads, strict=True),
            desc="indexing",
            total=len(self.pending),
            unit="video",
            disable=not self.pending,
        )
        with ProgressFile(self.writer.directory, len(self.pending)) as progress:
            for number, (video, read) in enumerate(shown, start=1):
                self._take(video, checked(read, self.writer.directory), batches)
                progress.update(number)
            batches.finish()
        self.report.unavailable = batches.unavailable
        self.writer.remove(list(self.missing))
        self.report.removed = len(self.missing)
        self.writer.compact()
        self.report.bad = self.writer.errors(self.changes.paths)
        self.report.bad |= {
            ascii(path)[1:-1]: "its name is not UTF-8; rename it" for path in self.changes.misnamed
        }
        self.report.windows = self.writer.header["windows"]
        self.report.nbytes = self.writer.nbytes()
        return self.report

    def _calls(
        self,
        videos: Sequence[IndexedVideo],
        known_sha256s: Callable[[IndexedVideo], frozenset[str]],
    ) -> tuple[list[tuple], list[float]]:
        """The calls of `read_video`, and the seconds that each may take."""
        calls = [self._call(video, known_sha256s(video)) for video in videos]
        return calls, [video.allowed for video in videos]

    def _calls_again(self, videos: Sequence[IndexedVideo]) -> tuple[list[tuple], list[float]]:
        """The same, of videos whose frames were lost."""
        return self._calls(videos, lambda video: frozenset())

    def _call(self, video: IndexedVideo, known_sha256s: frozenset[str]) -> tuple:
        """The arguments of `read_video`. Absolute: nodes have other working directories."""
        path, spool = self.folder / video.path, self.writer.spool_file(next(self._numbers))
        most = self.model.config.data.max_frames
        return path.absolute(), known_sha256s, most, self.model.frame_form, spool.absolute()

    def _known_sha256s(self, video: IndexedVideo) -> frozenset[str]:
        """Contents for which a file need not be decoded."""
        known = self.known.get(video.path)
        digests = {gone.sha256 for gone in self._movable[video.size].values()}
        # A video that took too long is decoded again, and so is one with damaged features.
        if known is not None and not known.allowed and video.path not in self.damaged:
            digests.add(known.sha256)
        return frozenset(digests - {""})

    def _take(self, video: IndexedVideo, read: VideoRead, batches: Batches) -> None:
        """Stores a file that was read, or adds it to the next batch."""
        if read.is_known:
            self._take_known(video, read.sha256, batches)
            return
        if video.path in self.known:
            self.report.changed += not read.is_passing
        else:
            self.report.added += not read.is_passing
        self.report.seconds += read.duration
        batches.add(video, read)

    def _take_known(self, video: IndexedVideo, sha256: str, batches: Batches) -> None:
        known = self.known.get(video.path)
        if known is not None and known.sha256 == sha256:  # Only its modification time changed.
            self.writer.touch(video)
            self.report.unchanged += 1
            return
        movable = self._movable[video.size]
        gone = next((gone for gone in movable.values() if gone.sha256 == sha256), None)
        if gone is None:  # Two new files have the content of one that is gone.
            read = read_video(*self._call(video, self._known_sha256s(video)))
            self._take(video, checked(read, self.writer.directory), batches)
            return
        self.writer.rename(gone.path, video)
        del self.missing[gone.path], movable[gone.path]
        self.report.moved += 1
