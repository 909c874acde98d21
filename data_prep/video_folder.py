"""Matches the annotated videos with the video files below a folder."""

import contextlib
import dataclasses
import os
import posixpath
import unicodedata
from collections.abc import Mapping, Set
from pathlib import Path

from data_prep.annotations import (
    AnnotationError,
    Annotations,
    leave_out_texts,
    without_video_suffix,
)
from data_prep.locations import Clip, FoundVideos
from data_prep.splits import Protocols, draw_again, merge_names, refuse_shared_files, same_files
from drl_jax.data.video_file import VIDEO_SUFFIXES
from drl_jax.runtime.files import files_below


class VideoFolder:
    """The video files below a directory: `files` are those with a video suffix, sorted."""

    def __init__(self, directory: Path):
        """Lists the files below the directory."""
        if not directory.is_dir():
            raise AnnotationError(
                f"no directory {directory}; --videos must be the folder of the video files"
            )
        self.directory = directory
        self._resolved = os.path.realpath(directory)
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
        """Finds the annotated videos: clips, and for each other video the reason, by id."""
        clips, not_found = [], {}
        sources_of = {video: annotations.sources_of(video) for video in annotations.video_ids()}
        # Files that an annotation has the full name of; no other one may take them.
        named = {
            path
            for sources in sources_of.values()
            for source in sources
            for name in self._spellings(source.file)
            for path in self._by_name.get(_normalised(name), ())
        }
        for video_id, sources in sources_of.items():
            candidates = [(source, self._find(source.file, named)) for source in sources]
            found = next((pair for pair in candidates if pair[1]), None)
            if found is None:
                not_found[video_id] = "no such file"
            elif len(found[1]) > 1:
                names = ", ".join(str(path.relative_to(self.directory)) for path in found[1])
                not_found[video_id] = f"several files have this name: {names}"
            else:
                clips.append(Clip(video_id, found[1][0], found[0].span))
        return clips, not_found

    def _find(self, name: str, named: Set[Path]) -> list[Path]:
        found = (self._find_spelling(spelling, named) for spelling in self._spellings(name))
        return next(filter(None, found), [])

    def _spellings(self, name: str) -> list[str]:
        """Forms of a name to look for: as it is written, and with the separators of Windows."""
        names = dict.fromkeys((name, name.replace("\\", "/")))
        return [self._below(posixpath.normpath(name)) for name in names]

    def _below(self, name: str) -> str:
        """An absolute path as one below the folder, if it is one, however the folder is written."""
        if not name.startswith("/"):
            return name
        parent, file = os.path.split(name)
        with contextlib.suppress(OSError, ValueError):
            # As it is written, it may lead through a link below the folder.
            for path, folder in (
                (name, self.directory),
                (name, self._resolved),
                (f"{os.path.realpath(parent)}/{file}", self._resolved),
            ):
                if not (below := os.path.relpath(path, folder)).startswith("../"):
                    return below
        return name

    def _find_spelling(self, spelling: str, named: Set[Path]) -> list[Path]:
        """The file with exactly this path, or else all files with the most similar name.

        That is: with the same name; with a video suffix after it; without a video suffix in it; or
        with another video suffix than it has.
        """
        name = _normalised(spelling)
        if name in self._by_path:
            return [self._by_path[name]]
        if name in self._by_name:
            return self._by_name[name]
        bare = without_video_suffix(name)
        found = self._by_stem.get(name, [])
        if name != bare:
            found = [path for path in found if path not in named]
        # A file without a video suffix, e.g. with a dot at the end; or a path through a link.
        found = found or self._others.get(name, []) or self._linked(spelling)
        while not found and name != bare:
            name, bare = bare, without_video_suffix(bare)
            similar = self._by_name.get(name) or self._by_stem.get(name, [])
            found = [path for path in similar if path not in named]
        return found

    def _linked(self, name: str) -> list[Path]:
        """The file with a path through a link, for a folder that is listed by another path."""
        path, inside = self.directory / name, not name.startswith(("/", "../"))
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
    """Videos of a dataset that can be decoded; see `FoundVideos`.

    `unusable` has reasons why others are left out, by id, and those of rows, by place; `merged` the
    id that is kept for each other id of a file with several names.
    """

    annotations: Annotations
    folder: Path
    clips: list[Clip]
    unusable: dict[str, str]
    unannotated: list[str]
    merged: dict[str, str] = dataclasses.field(default_factory=dict)


def make_plan(
    annotations: Annotations,
    videos: Path | None,
    quarantine: Mapping[str, str],
    *,
    protocols: Protocols = (),
) -> Plan:
    """Finds the annotated videos, and leaves out those of which the quarantine has a reason.

    A file with several names is one video. Splits that were drawn are drawn by the files.
    """
    annotations = dataclasses.replace(
        annotations, splits=dict(annotations.splits), left_out=dict(annotations.left_out)
    )
    gone = leave_out_texts(annotations)
    if (found := annotations.contained) is None:
        folder = VideoFolder(videos)
        located, missing = folder.locate(annotations)
        rest = sorted(set(folder.files) - {clip.location for clip in located})
        names = [str(path.relative_to(videos)) for path in rest]
        found = FoundVideos(videos, located, missing, names)
    clips = [clip for clip in found.clips if clip.video_id not in gone]
    groups = same_files(clips)
    if annotations.drawn:
        draw_again(annotations, groups)
    unusable = found.missing | annotations.left_out
    for clip in clips:
        if clip.video_id in quarantine:
            unusable[clip.video_id] = f"in quarantine: {quarantine[clip.video_id]}"
    groups = [[clip for clip in group if clip.video_id not in unusable] for group in groups]
    refuse_shared_files(annotations, groups, protocols)
    merged = merge_names(annotations, groups)
    # One path for each file: it tells later which videos are of one file.
    location = {clip.video_id: group[0].location for group in groups for clip in group}
    usable = [
        Clip(clip.video_id, location[clip.video_id], clip.span)
        if clip.video_id in location
        else clip
        for clip in clips
        if clip.video_id not in unusable and clip.video_id not in merged
    ]
    return Plan(annotations, found.folder, usable, unusable, found.unannotated, merged)
