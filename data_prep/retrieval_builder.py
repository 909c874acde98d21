"""The TFDS builder that every dataset of text-video retrieval shares.

A dataset's own builder says what its annotation files mean (`read_annotations`); finding, decoding
and storing the videos happens here.
"""

import abc
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data_prep.annotations import AnnotationError, Annotations, find_videos
from data_prep.decode import decode_videos
from drl_jax.data.records import FORMAT_VERSION, VIDEOS_SPLIT, storage_name


@dataclasses.dataclass
class StorageConfig(tfds.core.BuilderConfig):
    """How frames are stored."""

    image_size: int = 224
    max_frames: int = 12
    storage: str = "jpeg"

    @classmethod
    def of(cls, image_size: int, max_frames: int, storage: str) -> "StorageConfig":
        return cls(
            name=storage_name(image_size, max_frames, storage),
            image_size=image_size,
            max_frames=max_frames,
            storage=storage,
        )


class RetrievalBuilder(tfds.core.GeneratorBasedBuilder, abc.ABC, skip_registration=True):
    """Stores every video of a dataset once, and its splits as metadata.

    Attributes:
      missing_files: after a build, absent annotation files and what they are for.
      unusable: after a build, why each left-out video was left out, by id.
    """

    VERSION = tfds.core.Version(FORMAT_VERSION)

    def __init__(
        self, *, videos: Path | None = None, annotations: Path | None = None, **kwargs: Any
    ):
        """Builder of a dataset.

        Args:
          videos: directory with the video files.
          annotations: directory with the annotation files. Neither is needed to read what is built.
          **kwargs: TFDS's own.
        """
        self._videos_dir, self._annotations_dir = videos, annotations
        self.missing_files: dict[str, str] = {}
        self.unusable: dict[str, str] = {}
        super().__init__(**kwargs)

    @abc.abstractmethod
    def read_annotations(self, directory: Path) -> Annotations:
        """What the annotation files in a directory say.

        Raises:
          AnnotationError: they cannot be used.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        form = self.builder_config
        shape = (form.image_size, form.image_size, 3)
        if form.storage == "raw":
            # The default encoding of a Tensor stores bytes as varints: larger, and 15 times slower.
            frames = tfds.features.Tensor(
                shape=(None, *shape), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
            )
        else:
            frames = tfds.features.Sequence(
                tfds.features.Image(shape=shape, encoding_format="jpeg")
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {"video_id": tfds.features.Text(), "frames": frames}
            ),
            metadata=tfds.core.MetadataDict(),
            # Positions in the metadata are positions of the records.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager
        if self._videos_dir is None or self._annotations_dir is None:
            raise AnnotationError(
                f"build this dataset with: python -m data_prep.build {self.name} --videos=DIR"
                " --annotations=DIR --data_dir=DIR"
            )
        return {VIDEOS_SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        annotations = self.read_annotations(self._annotations_dir)
        self.missing_files = annotations.missing_files
        paths = find_videos(self._videos_dir)
        wanted = annotations.video_ids()
        self.unusable = {video: "no such file" for video in wanted if video not in paths}
        present = [video for video in wanted if video in paths]
        form = self.builder_config
        decoded = decode_videos(
            [paths[video] for video in present], form.max_frames, form.image_size, form.storage
        )
        records: dict[str, int] = {}
        progress = tqdm(zip(present, decoded, strict=True), "decoding", len(present), unit="video")
        for video, clip in progress:
            if clip.frames is None:
                self.unusable[video] = clip.error
                continue
            frames = clip.frames
            if form.storage == "jpeg":
                frames = [io.BytesIO(jpeg) for jpeg in frames]
            records[video] = len(records)
            yield records[video], {"video_id": video, "frames": frames}
        if not records:
            raise AnnotationError(
                f"none of the {len(wanted)} annotated videos can be used; {self._reasons()}"
            )
        self.info.metadata.update(_metadata(annotations, records))

    def _reasons(self) -> str:
        shown = [f"{video}: {reason}" for video, reason in list(self.unusable.items())[:3]]
        return f"the first are {'; '.join(shown)} (looked in {self._videos_dir})"


def _metadata(annotations: Annotations, records: dict[str, int]) -> dict[str, Any]:
    """The splits in terms of stored records; videos that are not stored drop out."""
    splits = {}
    for name, captioned in annotations.splits.items():
        usable = [entry for entry in captioned if entry.video_id in records]
        if not usable:
            continue
        row = {entry.video_id: number for number, entry in enumerate(usable)}
        pairs = annotations.reversed_pairs.get(name, [])
        splits[name] = {
            "videos": [records[entry.video_id] for entry in usable],
            "captions": [entry.captions for entry in usable],
            "reversed_pairs": [[row[a], row[b]] for a, b in pairs if a in row and b in row],
        }
    return {"video_ids": list(records), "splits": splits}
