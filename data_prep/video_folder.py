"""Matches the annotated videos with the video files below a folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from data_prep.annotations import AnnotationError, Annotations, Source, without_video_suffix
from drl_jax.data.video import VIDEO_SUFFIXES, Span
from drl_jax.runtime.files import files_with_suffix


@dataclasses.dataclass(frozen=True)
class Clip:
    """An annotated video on disk.

    Attributes:
      video_id: id of the video.
      path: its file.
      span: start and end in seconds; None: the whole file.
    """

    video_id: str
    path: Path
    span: Span | None


class VideoFolder:
    """The video files below a directory.

    Attributes:
      directory: the directory.
      files: paths of the video files, sorted.
    """

    def __init__(self, directory: Path):
        """Lists the video files below the directory.

        Raises:
          AnnotationError: the directory does not exist or contains no video.
        """
        if not directory.is_dir():
            raise AnnotationError(
                f"no directory {directory}; --videos must be the folder of the video files"
            )
        self.directory = directory
        self.files = files_with_suffix(directory, VIDEO_SUFFIXES)
        if not self.files:
            raise AnnotationError(
                f"no video in {directory} or its subfolders (suffixes: {' '.join(VIDEO_SUFFIXES)})"
            )
        self._by_path = {str(path.relative_to(directory)): path for path in self.files}
        self._by_name: dict[str, list[Path]] = {}
        for path in self.files:
            self._by_name.setdefault(path.stem, []).append(path)

    def locate(self, annotations: Annotations) -> tuple[list[Clip], dict[str, str]]:
        """Finds the files of the annotated videos.

        Returns:
          The clips that were found, and for each other video the reason, by id.
        """
        clips, not_found = [], {}
        for video_id in annotations.video_ids():
            sources = annotations.sources_of(video_id)
            candidates = [(source, self._find(source)) for source in sources]
            found = next((pair for pair in candidates if pair[1]), None)
            if found is None:
                not_found[video_id] = "no such file"
            elif len(found[1]) > 1:
                names = ", ".join(str(path.relative_to(self.directory)) for path in found[1])
                not_found[video_id] = f"several files have this name: {names}"
            else:
                clips.append(Clip(video_id, found[1][0], found[0].span))
        return clips, not_found

    def _find(self, source: Source) -> list[Path]:
        """The file with exactly this path, or else all files with this name."""
        if source.file in self._by_path:
            return [self._by_path[source.file]]
        return self._by_name.get(without_video_suffix(source.file), [])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Videos of a dataset that can be decoded.

    Attributes:
      annotations: the dataset's annotations.
      folder: folder of the video files.
      clips: annotated videos that were found.
      unusable: reasons why the other videos are left out, by id.
      unannotated: paths, below the folder, of video files without annotation.
    """

    annotations: Annotations
    folder: Path
    clips: list[Clip]
    unusable: dict[str, str]
    unannotated: list[str]


def make_plan(annotations: Annotations, videos: Path, quarantine: Mapping[str, str]) -> Plan:
    """Finds the annotated videos in a folder, and leaves out those in quarantine.

    Args:
      annotations: the dataset's annotations.
      videos: folder of the video files.
      quarantine: reasons by id of the videos to leave out.

    Raises:
      AnnotationError: the folder contains no video.
    """
    folder = VideoFolder(videos)
    clips, unusable = folder.locate(annotations)
    unannotated = sorted(set(folder.files) - {clip.path for clip in clips})
    for clip in clips:
        if clip.video_id in quarantine:
            unusable[clip.video_id] = f"in quarantine: {quarantine[clip.video_id]}"
    usable = [clip for clip in clips if clip.video_id not in unusable]
    names = [str(path.relative_to(videos)) for path in unannotated]
    return Plan(annotations, videos, usable, unusable, names)
