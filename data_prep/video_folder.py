"""A folder of video files, and which of them the annotated videos are."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from data_prep.annotations import AnnotationError, Annotations, Source, without_video_suffix
from drl_jax.data.video import VIDEO_SUFFIXES, Span


@dataclasses.dataclass(frozen=True)
class Clip:
    """An annotated video on disk."""

    video_id: str
    path: Path
    span: Span | None


class VideoFolder:
    """The video files below a directory."""

    def __init__(self, directory: Path):
        """Walks the directory.

        Raises:
          AnnotationError: there is no such directory, or no video in it.
        """
        if not directory.is_dir():
            raise AnnotationError(
                f"no directory {directory}; --videos names the folder of the videos"
            )
        self.directory = directory
        self.files = [
            path
            for path in sorted(directory.rglob("*"))
            if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
        ]
        if not self.files:
            raise AnnotationError(
                f"no video in {directory} (looked for {' '.join(VIDEO_SUFFIXES)} in all its"
                " folders)"
            )
        self._by_path = {str(path.relative_to(directory)): path for path in self.files}
        self._by_name: dict[str, list[Path]] = {}
        for path in self.files:
            self._by_name.setdefault(path.stem, []).append(path)

    def locate(self, annotations: Annotations) -> tuple[list[Clip], dict[str, str]]:
        """The annotated videos that are there, and why the others are not, by id."""
        clips, absent = [], {}
        for video_id in annotations.video_ids():
            sources = annotations.sources_of(video_id)
            candidates = [(source, self._find(source)) for source in sources]
            found = next((pair for pair in candidates if pair[1]), None)
            if found is None:
                absent[video_id] = "no such file"
            elif len(found[1]) > 1:
                names = ", ".join(str(path.relative_to(self.directory)) for path in found[1])
                absent[video_id] = f"several files have this name: {names}"
            else:
                clips.append(Clip(video_id, found[1][0], found[0].span))
        return clips, absent

    def _find(self, source: Source) -> list[Path]:
        """The file of exactly this path, or else all files of this name."""
        if source.file in self._by_path:
            return [self._by_path[source.file]]
        return self._by_name.get(without_video_suffix(source.file), [])


@dataclasses.dataclass(frozen=True)
class Plan:
    """What of a dataset can be decoded.

    Attributes:
      annotations: what its files say.
      folder: of the video files.
      clips: the annotated videos that are there.
      unusable: why the others are left out, by id.
      unannotated: paths of the video files in the folder that no annotation names.
    """

    annotations: Annotations
    folder: Path
    clips: list[Clip]
    unusable: dict[str, str]
    unannotated: list[str]


def make_plan(annotations: Annotations, videos: Path, quarantine: Mapping[str, str]) -> Plan:
    """Finds the annotated videos in a folder, without those in quarantine.

    Raises:
      AnnotationError: the folder has no video.
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
