"""Matches the annotated videos with the video files below a folder."""

import contextlib
import dataclasses
import unicodedata
from collections.abc import Mapping, Set
from pathlib import Path

from data_prep.annotations import (
    AnnotationError,
    Annotations,
    Source,
    check_texts,
    without_video_suffix,
)
from data_prep.locations import Clip, FoundVideos
from drl_jax.data.video import VIDEO_SUFFIXES
from drl_jax.runtime.files import files_below


class VideoFolder:
    """The video files below a directory.

    Attributes:
      directory: the directory.
      files: paths of the files with a video suffix, sorted.
    """

    def __init__(self, directory: Path):
        """Lists the files below the directory.

        Raises:
          AnnotationError: the directory does not exist or contains no video.
        """
        if not directory.is_dir():
            raise AnnotationError(
                f"no directory {directory}; --videos must be the folder of the video files"
            )
        self.directory = directory
        self.files: list[Path] = []
        self._by_path: dict[str, Path] = {}
        # Files by name and by path; the first two have video files only.
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        self._others: dict[str, list[Path]] = {}
        for path in files_below(directory):
            inner = path.relative_to(directory)
            if path.suffix.lower() not in VIDEO_SUFFIXES:
                _add(self._others, inner, path)
                continue
            self.files.append(path)
            self._by_path[_normalised(str(inner))] = path
            _add(self._by_name, inner, path)
            _add(self._by_stem, inner.with_suffix(""), path)
        if not self.files:
            raise AnnotationError(
                f"no video in {directory} or its subfolders (suffixes: {' '.join(VIDEO_SUFFIXES)})"
            )

    def locate(self, annotations: Annotations) -> tuple[list[Clip], dict[str, str]]:
        """Finds the files of the annotated videos.

        Returns:
          The clips that were found, and for each other video the reason, by id.
        """
        clips, not_found = [], {}
        sources_of = {video: annotations.sources_of(video) for video in annotations.video_ids()}
        # Files that an annotation has the full name of; no other one may take them.
        named = {
            path
            for sources in sources_of.values()
            for source in sources
            for path in self._by_name.get(_normalised(source.file), ())
        }
        for video_id, sources in sources_of.items():
            candidates = [(source, self._find(source, named)) for source in sources]
            found = next((pair for pair in candidates if pair[1]), None)
            if found is None:
                not_found[video_id] = "no such file"
            elif len(found[1]) > 1:
                names = ", ".join(str(path.relative_to(self.directory)) for path in found[1])
                not_found[video_id] = f"several files have this name: {names}"
            else:
                clips.append(Clip(video_id, found[1][0], found[0].span))
        return clips, not_found

    def _find(self, source: Source, named: Set[Path]) -> list[Path]:
        """The file with exactly this path, or else all files with the most similar name.

        That is: with the same name; with a video suffix after it; without a video suffix in it; or
        with another video suffix than it has.
        """
        name = _normalised(source.file)
        if name in self._by_path:
            return [self._by_path[name]]
        if name in self._by_name:
            return self._by_name[name]
        bare = without_video_suffix(name)
        found = self._by_stem.get(name, [])
        if name != bare:
            found = [path for path in found if path not in named]
        # A file without a video suffix, e.g. with a dot at the end; or a path through a link.
        found = found or self._others.get(name, []) or self._linked(source)
        while not found and name != bare:
            name, bare = bare, without_video_suffix(bare)
            similar = self._by_name.get(name) or self._by_stem.get(name, [])
            found = [path for path in similar if path not in named]
        return found

    def _linked(self, source: Source) -> list[Path]:
        """The file with a path through a link, for a folder that is listed by another path."""
        path = self.directory / source.file
        inside = path.is_relative_to(self.directory) and ".." not in path.parts
        # A name can be too long for the file system, or its folder unreadable.
        with contextlib.suppress(OSError):
            return [path] if inside and path.is_file() else []
        return []


def _add(index: dict[str, list[Path]], key: Path, path: Path) -> None:
    for name in {str(key), key.name}:
        index.setdefault(_normalised(name), []).append(path)


def _normalised(name: str) -> str:
    """The composed form: macOS decomposes accents in file names."""
    return unicodedata.normalize("NFC", name)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Videos of a dataset that can be decoded.

    Attributes:
      annotations: the dataset's annotations.
      folder: folder of the video files, or of the files that contain the videos.
      clips: annotated videos that were found.
      unusable: reasons why the other videos are left out, by id.
      unannotated: names, below the folder, of videos without annotation.
    """

    annotations: Annotations
    folder: Path
    clips: list[Clip]
    unusable: dict[str, str]
    unannotated: list[str]


def make_plan(annotations: Annotations, videos: Path | None, quarantine: Mapping[str, str]) -> Plan:
    """Finds the annotated videos, and leaves out those in quarantine.

    Args:
      annotations: the dataset's annotations.
      videos: folder of the video files; not used if the annotation files contain the videos.
      quarantine: reasons by id of the videos to leave out.

    Raises:
      AnnotationError: the folder is None or contains no video, or a text cannot be stored.
    """
    check_texts(annotations)
    found = annotations.contained or _find_files(annotations, videos)
    unusable = dict(found.missing)
    for clip in found.clips:
        if clip.video_id in quarantine:
            unusable[clip.video_id] = f"in quarantine: {quarantine[clip.video_id]}"
    usable = [clip for clip in found.clips if clip.video_id not in unusable]
    return Plan(annotations, found.folder, usable, unusable, found.unannotated)


def _find_files(annotations: Annotations, videos: Path | None) -> FoundVideos:
    if videos is None:
        raise AnnotationError("the annotations name video files: --videos must be their folder")
    folder = VideoFolder(videos)
    clips, missing = folder.locate(annotations)
    unannotated = sorted(set(folder.files) - {clip.location for clip in clips})
    names = [str(path.relative_to(videos)) for path in unannotated]
    return FoundVideos(videos, clips, missing, names)
