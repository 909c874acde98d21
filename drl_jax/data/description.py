"""Ids, sources and splits of a dataset, as `metadata.json` and the files beside it describe them.

In layout 2, `metadata.json` has what is small: the names of the splits, and their pairs of clips
that are reversed. In layout 1, of earlier versions, it has everything.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from drl_jax.data.content import content_sha256
from drl_jax.data.description_files import (
    VIDEOS_FILE,
    Sources,
    Videos,
    captions_file,
    id_hash,
    read_captions,
    read_videos,
)
from drl_jax.data.splits import CaptionOrigin, Captions, Split
from drl_jax.runtime.files import sha256

LAYOUT = 2
METADATA = "metadata.json"


class Description:
    """The description of a dataset.

    Attributes:
      files: names of the files that belong to it beside `metadata.json`.
      split_names: names of the splits.
      videos: ids and sources of the records.
    """

    def __init__(self, directory: Path, metadata: Mapping[str, Any], hashes: Mapping[str, str]):
        """Opens the description; captions are opened with their split.

        Args:
          directory: of the dataset.
          metadata: content of `metadata.json`.
          hashes: SHA-256 of each file, by name; layout 2 needs those of `files`.

        Raises:
          OSError, ValueError, KeyError, TypeError: the description is incomplete, or a file is
            missing or not the one with its hash.
        """
        self._directory, self._hashes = directory, dict(hashes)
        self._checked: set[str] = set()
        self._splits: Mapping[str, Any] = metadata["splits"]
        self.split_names = list(self._splits)
        layout = metadata.get("layout", 1)
        if layout not in (1, LAYOUT):
            raise ValueError(f"{METADATA} has the layout {layout}, of a later version")
        self.files = []
        if layout == 1:
            self.videos = Videos(metadata["video_ids"], metadata.get("sources", []), None)
            return
        self.files = [VIDEOS_FILE, *map(captions_file, self.split_names)]
        for name in self.files:
            (directory / name).stat()
            if name not in self._hashes:
                raise ValueError(f"the hash of {name} is missing in manifest.json")
        self._check(VIDEOS_FILE)
        self.videos = read_videos(directory)

    def split(self, name: str) -> Split:
        """A split; the first time, its file is compared with its hash.

        Raises:
          KeyError: there is no such split.
          OSError, ValueError: its file is missing or damaged.
        """
        stored = self._splits[name]
        reversed_pairs = np.asarray(stored["reversed_pairs"], np.int32).reshape(-1, 2)
        if not self.files:
            origin = CaptionOrigin(self._directory, name, self._metadata_sha256)
            videos = np.asarray(stored["videos"], np.int32)
            return Split(videos, Captions.of(stored["captions"], origin), reversed_pairs)
        file = captions_file(name)
        self._check(file)
        videos, captions = read_captions(CaptionOrigin(self._directory, name, self._hashes[file]))
        return Split(videos, captions, reversed_pairs)

    def content(self, frames: str) -> str:
        """Hexadecimal SHA-256 of all stored frames, ids and captions.

        Args:
          frames: hash of the frames.

        Raises:
          OSError, ValueError: a file of captions is missing or damaged.
        """
        splits = {name: self.split(name) for name in self.split_names}
        return content_sha256(frames, self.videos.ids, splits)

    def id_hashes(self, records: np.ndarray) -> np.ndarray:
        """`id_hash` of the videos with these record indices, uint64."""
        if self.videos.id_hashes is not None:
            return self.videos.id_hashes[records]
        ids = self.videos.ids
        return np.fromiter((id_hash(ids[record]) for record in records), np.uint64, len(records))

    def of_same_files(self, records: np.ndarray) -> np.ndarray:
        """Indices of all records whose files are those of these, ascending."""
        sources = self.videos.sources
        return sources.of_same_files(records) if isinstance(sources, Sources) else np.sort(records)

    @functools.cached_property
    def _metadata_sha256(self) -> str:
        return self._hashes.get(METADATA) or sha256(self._directory / METADATA)

    def _check(self, name: str) -> None:
        if name in self._checked:
            return
        if sha256(self._directory / name) != self._hashes[name]:
            raise ValueError(f"{name} is not the file that the build wrote")
        self._checked.add(name)
