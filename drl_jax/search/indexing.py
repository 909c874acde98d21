"""Creates and updates the index of a folder of videos."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.pretrained import RetrievalModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.files import files_with_suffix
from drl_jax.runtime.worker_pool import WorkerFailure, map_in_processes
from drl_jax.search.format_2 import made_with
from drl_jax.search.reading import VideoRead, read_video
from drl_jax.search.rows import IndexedVideo, SearchIndexError
from drl_jax.search.store import Store


@dataclasses.dataclass
class IndexReport:
    """Result of an update.

    Attributes:
      added: number of new files.
      changed: number of files with changed content.
      removed: number of files that were deleted.
      unchanged: number of other files.
      bad: why files cannot be searched, by path; of all files, also unchanged ones.
      nbytes: size of the stored features.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    nbytes: int = 0


def update_index(
    model: RetrievalModel,
    videos: Path,
    directory: Path,
    *,
    storage: str = "bfloat16",
    timeout: float = 300.0,
) -> IndexReport:
    """Updates an index to the files of a folder; decodes only new and changed files.

    Features are stored batch by batch: after an interruption, the same call continues.

    Args:
      model: encodes the videos.
      videos: folder of the videos, searched recursively.
      directory: of the index; created if it does not exist.
      storage: how features are stored, one of `drl_jax.search.STORAGES`.
      timeout: seconds for decoding one video.

    Raises:
      UserError: the folder does not exist, there is no video, or the index is of another model,
        folder or storage.
    """
    if not videos.is_dir():
        raise UserError(f"no directory {videos}; --videos names the folder of the videos")
    with Store(directory, write=True) as store:
        _check_header(store, model, videos, storage)
        known = {video.path: video for video in store.videos()}
        found = {video.path: video for video in _find_videos(videos)}
        misnamed = [path for path in found if not _is_text(path)]
        for path in misnamed:
            del found[path]
        if not found and not known:
            raise UserError(f"no video in {videos} (looked for {' '.join(VIDEO_SUFFIXES)})")
        report = IndexReport()
        missing = sorted(known.keys() - found.keys())
        store.remove(missing)
        report.removed = len(missing)
        pending = [
            video
            for path, video in found.items()
            if path not in known or _state(known[path]) != _state(video)
        ]
        report.unchanged = len(found) - len(pending)
        calls = [
            (
                videos / video.path,
                known[video.path].sha256 if video.path in known else "",
                model.config.data.max_frames,
                model.frame_form,
            )
            for video in pending
        ]
        reads = map_in_processes(read_video, calls, timeout=timeout)
        progress = tqdm(
            zip(pending, reads, strict=True),
            desc="indexing",
            total=len(pending),
            unit="video",
            disable=not pending,
        )
        for batch in _batches(progress, model.config.eval.batch_size):
            _store_batch(store, model, known, batch, report)
        store.compact()
        report.bad = {video.path: video.error for video in store.videos() if video.error}
        report.bad |= {ascii(path)[1:-1]: "its name is not UTF-8; rename it" for path in misnamed}
        report.nbytes = store.nbytes()
    return report


def _check_header(store: Store, model: RetrievalModel, videos: Path, storage: str) -> None:
    """Writes the header of a new index, or checks that an index matches; upgrades format 2."""
    folder, header = str(videos.resolve()), store.header
    if not header:
        store.update_header(
            source=model.source, fingerprint=model.fingerprint, videos=folder, storage=storage
        )
        return
    for matches, other in (
        (made_with(header, model), "model"),
        (header["videos"] == folder, f"folder, {header['videos']}"),
        (header["storage"] == storage, f"storage, {header['storage']}"),
    ):
        if not matches:
            raise SearchIndexError(
                f"the index {store.directory} was made with another {other}; give another --index,"
                " or delete it"
            )
    if not header["fingerprint"]:
        store.update_header(fingerprint=model.fingerprint)


def _find_videos(folder: Path) -> Iterator[IndexedVideo]:
    for path in files_with_suffix(folder, VIDEO_SUFFIXES):
        status = path.stat()
        yield IndexedVideo(
            str(path.relative_to(folder)), status.st_size, status.st_mtime_ns, sha256=""
        )


def _is_text(path: str) -> bool:
    """Whether a path is valid UTF-8: other bytes are decoded to lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def _state(video: IndexedVideo) -> tuple[int, int]:
    return video.size, video.mtime_ns


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _store_batch(
    store: Store,
    model: RetrievalModel,
    known: dict[str, IndexedVideo],
    batch: list[tuple[IndexedVideo, VideoRead | WorkerFailure]],
    report: IndexReport,
) -> None:
    """Encodes and stores files that were read, and counts them in the report."""
    records, clips, thumbnails = [], [], []
    for video, read in batch:
        if isinstance(read, WorkerFailure):
            read = VideoRead("", read.reason)
        if not read.error and read.frames is None:  # Only its modification time changed.
            store.touch(video)
            report.unchanged += 1
            continue
        if video.path in known:
            report.changed += 1
        else:
            report.added += 1
        records.append(
            dataclasses.replace(video, sha256=read.sha256, error=read.error, times=read.times)
        )
        if read.frames is not None:
            clips.append(read.frames)
            thumbnails.append(read.thumbnails)
    if not records:
        return
    features = model.encode_video(clips) if clips else {}
    store.put(records, features, thumbnails)
