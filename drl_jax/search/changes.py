"""What has changed between an index and its folder of videos."""

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path, PurePath

from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.runtime.errors import UserError
from drl_jax.search.rows import IndexedVideo, KnownFile
from drl_jax.search.video_files import (
    Shard,
    find_video,
    find_videos,
    is_outdated,
    is_text,
    names_of_no_files,
)
from drl_jax.search.writer import IndexWriter


@dataclasses.dataclass
class Changes:
    """The files that an update has to look at; those that have not changed are only counted.

    Attributes:
      pending: new and changed files, and those with damaged features; with the seconds that
        decoding may take.
      known: what the index has of the pending and the missing files, by path.
      missing: files of the index that are gone, by path.
      unchanged: number of the other files.
      paths: of the files that were compared; None: all.
      misnamed: paths that are not UTF-8.
      skipped: names of videos that are no files.
    """

    pending: list[IndexedVideo]
    known: dict[str, KnownFile]
    missing: dict[str, KnownFile]
    unchanged: int
    paths: list[str] | None = None
    misnamed: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)

    def add(self, file: KnownFile | None, video: IndexedVideo | None) -> None:
        """Compares what the index has of a file with the file; None: it is not there."""
        if (
            file is not None
            and video is not None
            and not (file.is_damaged or is_outdated(file, video))
        ):
            self.unchanged += 1
            return
        if file is not None:
            self.known[file.path] = file
        if video is not None:
            self.pending.append(video)
        else:
            self.missing[file.path] = file

    @property
    def damaged(self) -> set[str]:
        """Paths of the files whose features are damaged or lost."""
        return {path for path, file in self.known.items() if file.is_damaged}

    def may_have_moved(self) -> bool:
        """Whether each missing file has one of its size among the new ones."""
        new = collections.Counter(v.size for v in self.pending if v.path not in self.known)
        return not collections.Counter(file.size for file in self.missing.values()) - new


def changes_of_folder(
    writer: IndexWriter, folder: Path, timeout: float, shard: Shard | None
) -> Changes:
    """Compares an index with all files of its folder, and checks its rows and features.

    Of each file, only what it is compared by stays in memory: path, size, time and hash.

    Args:
      writer: of the index.
      folder: of the videos.
      timeout: seconds for decoding one video, and one more for each MB of its file.
      shard: only its files; None: all.

    Raises:
      SearchIndexError: the index is damaged.
      UserError: neither the folder nor the index has a video.
    """
    known = {file.path: file for file in writer.files()}
    comparison, has_names = Changes([], {}, {}, 0), bool(known)
    for video in find_videos(folder, timeout):
        if not is_text(video.path):
            comparison.misnamed.append(video.path)
            continue
        has_names = True
        if shard is None or shard.has(video.path):
            comparison.add(known.pop(video.path, None), video)
    if not has_names:
        raise UserError(f"no video in {folder} (looked for {' '.join(VIDEO_SUFFIXES)})")
    for path in sorted(known):
        comparison.add(known[path], None)
    comparison.skipped = names_of_no_files(folder)
    return comparison


def changes_of_files(
    writer: IndexWriter, folder: Path, timeout: float, paths: Sequence[str], shard: Shard | None
) -> Changes:
    """Compares an index with some files of its folder.

    Reads only their rows and features: the time it takes does not depend on the number of videos.

    Args:
      writer: of the index.
      folder: of the videos.
      timeout: see `changes_of_folder`.
      paths: of the files, relative to the folder; or absolute and below it.
      shard: see `changes_of_folder`.

    Raises:
      SearchIndexError: a row is damaged.
      UserError: neither the folder nor the index has one of the files, or it is of another shard.
    """
    paths = list(dict.fromkeys(_below(folder, PurePath(path)) for path in paths))
    comparison = Changes([], {}, {}, 0, paths)
    for path in paths:
        video, file = find_video(folder, path, timeout), writer.file_at(path)
        if video is None and file is None:
            raise UserError(f"--only={path}: neither {folder} nor the index has such a video")
        if shard is not None and not shard.has(path):
            raise UserError(f"--only={path}: it is not in shard {shard} of {folder}")
        comparison.add(file, video)
    return comparison


def _below(folder: Path, path: PurePath) -> str:
    """A path relative to the folder, if it is below it."""
    folder = folder.absolute()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
