"""The TFDS builder that every dataset of text-video retrieval shares.

A dataset's own builder says what its annotation files mean (`read_annotations`); finding, decoding
and storing the videos happens here.
"""

import abc
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from data_prep.annotations import AnnotationError, Annotations
from data_prep.decode import Decoded, decode_clips
from data_prep.frame_cache import FrameCache
from data_prep.manifest import ContentHash, make_manifest
from data_prep.video_folder import Clip, Plan
from drl_jax.data.records import FORMAT_VERSION, MANIFEST, VIDEOS_SPLIT, storage_name

# Videos of a file of records.
_VIDEOS_PER_SHARD = 1000
# Videos that are written together: TFDS writes its description of the dataset each time.
_VIDEOS_PER_WRITE = 64
# Seconds that the decoding of a video may take.
DECODE_TIMEOUT = 300


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

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("image_size", "max_frames", "storage")}


class RetrievalBuilder(FileReaderBuilder, abc.ABC, skip_registration=True):
    """Stores every video of a dataset once, and its splits as metadata."""

    VERSION = tfds.core.Version(FORMAT_VERSION)
    # Side of the frames in pixels, frames a video at most, and storage, unless asked otherwise.
    DEFAULT_FORM: ClassVar[tuple[int, int, str]] = (224, 12, "jpeg")
    # For each split, the least and the most "videos" and "captions" that publications give it.
    PUBLISHED: ClassVar[Mapping[str, Mapping[str, tuple[int, int]]]] = {}
    # Whether decoded frames stay after a build, for the next one with other annotations.
    KEEPS_CACHE: ClassVar[bool] = True

    @classmethod
    @abc.abstractmethod
    def read_annotations(cls, path: Path) -> Annotations:
        """What the annotation files say.

        Args:
          path: their directory (of `custom`, the file).

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

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        raise AnnotationError(
            f"build this dataset with: python -m data_prep.build {self.name} --videos=DIR"
            " --annotations=DIR --data_dir=DIR"
        )

    def store(self, plan: Plan, cache_dir: Path, timeout: float = DECODE_TIMEOUT) -> None:
        """Decodes and writes the dataset into `data_dir`, which is then to be moved to its place.

        Records are written one after another. (`download_and_prepare` collects them to shuffle
        them; without shuffling, what exceeds 1 GB is then sorted in memory in one piece.)

        Args:
          plan: the videos and captions to store.
          cache_dir: directory for decoded frames.
          timeout: seconds that the decoding of a video may take.

        Raises:
          AnnotationError: no video can be used.
          OSError, RuntimeError: the disk is full.
        """
        directory = Path(self.data_dir)
        directory.mkdir(parents=True)
        form, annotations = self.builder_config, plan.annotations
        unusable = dict(plan.unusable)
        writer = _StableWriter(
            self.info, max_examples_per_shard=_VIDEOS_PER_SHARD, file_format="array_record"
        )
        writer.initialize_splits([VIDEOS_SPLIT])
        records: dict[str, int] = {}
        content = ContentHash()
        cache = FrameCache(cache_dir, **form.settings())
        decoded = decode_clips(plan.clips, cache=cache, timeout=timeout, **form.settings())
        examples = self._examples(plan.clips, decoded, records, unusable, content)
        while some := list(itertools.islice(examples, _VIDEOS_PER_WRITE)):
            writer.add_examples({VIDEOS_SPLIT: some})
        if not records:
            raise AnnotationError(_none_left(annotations, unusable))
        self.info.metadata.update(_metadata(plan, records))
        writer.close_all()
        manifest = make_manifest(
            self.name,
            form.settings(),
            annotations,
            records,
            unusable,
            self.PUBLISHED,
            content,
        )
        manifest_json = json.dumps(manifest, indent=1) + "\n"
        (directory / MANIFEST).write_text(manifest_json, encoding="utf-8")

    def _examples(
        self,
        clips: list[Clip],
        decoded: Iterator[Decoded],
        records: dict[str, int],
        unusable: dict[str, str],
        content: ContentHash,
    ) -> Iterator[dict[str, Any]]:
        """Records of the clips that could be decoded; fills `records`, `unusable`, `content`."""
        progress = tqdm(zip(clips, decoded, strict=True), "decoding", len(clips), unit="video")
        for clip, found in progress:
            if found.frames is None:
                unusable[clip.video_id] = found.error
                continue
            records[clip.video_id] = len(records)
            content.update(clip.video_id, found.frames)
            frames = found.frames
            if self.builder_config.storage == "jpeg":
                frames = [io.BytesIO(jpeg) for jpeg in frames]
            yield {"video_id": clip.video_id, "frames": frames}


class _StableWriter(tfds.core.SequentialWriter):
    """Writes the same bytes in every process.

    A tf.Example is a map, and protobuf serialises a map in an order that differs between processes
    unless it is told not to.
    """

    def __init__(self, ds_info: tfds.core.DatasetInfo, **settings: Any):
        super().__init__(ds_info, **settings)
        self._serializer = _StableSerializer(ds_info.features.get_serialized_info())


class _StableSerializer(ExampleSerializer):
    def serialize_example(self, example: Any) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)


def _none_left(annotations: Annotations, unusable: Mapping[str, str]) -> str:
    shown = [f"{video}: {reason}" for video, reason in list(unusable.items())[:3]]
    return (
        f"none of the {len(annotations.video_ids())} annotated videos can be used; the first are"
        f" {'; '.join(shown)}"
    )


def _metadata(plan: Plan, records: Mapping[str, int]) -> dict[str, Any]:
    """The splits in terms of stored records; videos that are not stored drop out."""
    splits = {}
    for name, captioned in plan.annotations.splits.items():
        usable = [entry for entry in captioned if entry.video_id in records]
        if not usable:
            continue
        row = {entry.video_id: number for number, entry in enumerate(usable)}
        pairs = plan.annotations.reversed_pairs.get(name, [])
        splits[name] = {
            "videos": [records[entry.video_id] for entry in usable],
            "captions": [entry.captions for entry in usable],
            "reversed_pairs": [[row[a], row[b]] for a, b in pairs if a in row and b in row],
        }
    # Where each record comes from: path below the folder of the videos, start and end in seconds.
    sources = [
        [str(clip.path.relative_to(plan.folder)), *(clip.span or ())]
        for clip in plan.clips
        if clip.video_id in records
    ]
    return {"video_ids": list(records), "sources": sources, "splits": splits}
