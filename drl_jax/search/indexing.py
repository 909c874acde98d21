"""Fills an index from a folder of videos, and keeps it up to date with the folder."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.pretrained import SearchModel
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.worker_pool import Lost, map_in_processes
from drl_jax.search.reading import VideoRead, read_video
from drl_jax.search.store import IndexedVideo, SearchIndexError, Store


@dataclasses.dataclass
class IndexReport:
    """What an update did to an index.

    Attributes:
      added: files that are new.
      changed: files whose content is another than before.
      removed: files that are gone.
      unchanged: files that were left alone.
      bad: why files cannot be searched, by path; of all files, also of unchanged ones.
      nbytes: size of the stored features.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    bad: dict[str, str] = dataclasses.field(default_factory=dict)
    nbytes: int = 0


def update_index(
    model: SearchModel,
    videos: Path,
    directory: Path,
    *,
    storage: str = "bfloat16",
    timeout: float = 300.0,
) -> IndexReport:
    """Brings an index up to date with a folder; what is unchanged is not decoded again.

    Every few videos are stored as they are done: after an interruption the same call goes on.

    Args:
      model: embeds the videos.
      videos: folder, with all folders below it.
      directory: of the index; created if absent.
      storage: how features are stored, of `store.STORAGES`.
      timeout: seconds that the decoding of a video may take.

    Raises:
      UserError: no such folder, no video in it and none indexed, or the index is of another model,
        folder or storage.
    """
    if not videos.is_dir():
        raise UserError(f"no directory {videos}; --videos names the folder of the videos")
    with Store(directory, write=True) as store:
        _check_header(store, model, videos, storage)
        known = {video.path: video for video in store.videos()}
        found = dict(_walk(videos))
        unnamable = [path for path in found if not _is_text(path)]
        for path in unnamable:
            del found[path]
        if not found and not known:
            raise UserError(f"no video in {videos} (looked for {' '.join(VIDEO_SUFFIXES)})")
        report = IndexReport()
        gone = sorted(known.keys() - found.keys())
        store.remove(gone)
        report.removed = len(gone)
        due = [
            video
            for path, video in found.items()
            if path not in known or _state(known[path]) != _state(video)
        ]
        report.unchanged = len(found) - len(due)
        calls = [
            (
                videos / video.path,
                known[video.path].sha256 if video.path in known else "",
                model.config.data.max_frames,
                model.config.model.clip.image_resolution,
            )
            for video in due
        ]
        reads = map_in_processes(read_video, calls, timeout=timeout)
        progress = tqdm(zip(due, reads, strict=True), "indexing", len(due), unit="video")
        for batch in _batches(progress, model.config.eval.batch_size):
            _store_batch(store, model, known, batch, report)
        report.bad = {video.path: video.error for video in store.videos() if video.error}
        report.bad |= {ascii(path)[1:-1]: "its name is not UTF-8; rename it" for path in unnamable}
        report.nbytes = store.nbytes()
    return report


def _check_header(store: Store, model: SearchModel, videos: Path, storage: str) -> None:
    header = {
        "source": model.source,
        "fingerprint": model.fingerprint,
        "videos": str(videos.resolve()),
        "storage": storage,
    }
    if not store.header:
        store.set_header(header)
        return
    for name, what in (
        ("fingerprint", "another model"),
        ("videos", f"another folder, {store.header['videos']}"),
        ("storage", f"another storage, {store.header['storage']}"),
    ):
        if store.header[name] != header[name]:
            raise SearchIndexError(
                f"the index {store.directory} was made with {what}; give another --index, or delete"
                " it"
            )


def _walk(videos: Path) -> Iterator[tuple[str, IndexedVideo]]:
    for path in sorted(videos.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            status = path.stat()
            name = str(path.relative_to(videos))
            yield name, IndexedVideo(name, status.st_size, status.st_mtime_ns, "")


def _is_text(path: str) -> bool:
    """Whether a path has characters only, and no bytes that are none in UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in path)


def _state(video: IndexedVideo) -> tuple[int, int]:
    return video.size, video.mtime_ns


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _store_batch(
    store: Store,
    model: SearchModel,
    known: dict[str, IndexedVideo],
    batch: list[tuple[IndexedVideo, VideoRead | Lost]],
    report: IndexReport,
) -> None:
    """Embeds and stores some files that were read; counts them in the report."""
    records, clips, thumbnails = [], [], []
    for video, read in batch:
        if isinstance(read, Lost):
            read = VideoRead("", read.reason)
        if not read.error and read.frames is None:  # only its time of change is another
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
    features = {}
    if clips:
        features = model.embedder.videos(
            model.params, lambda rows: [clips[row] for row in rows], len(clips)
        )
    store.put(records, features, thumbnails)
