"""TFDS builder that all text-video retrieval datasets share.

The builder of a dataset reads its annotation files (`read_annotations`); this one finds, decodes
and stores the videos.
"""

import abc
import contextlib
import hashlib
import importlib.metadata
import io
import os
import platform
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.core.sequential_writer import Shard
from tqdm import tqdm

from data_prep.annotations import AnnotationError, Annotations, check_lost
from data_prep.decode import FrameCache, decode_clips, decoder_versions
from data_prep.manifest import annotation_hashes, file_hashes, write_description
from data_prep.sizes import PublishedSizes, count_splits
from data_prep.video_folder import Plan
from drl_jax.data.content import content_sha256
from drl_jax.data.description import read_split
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.records import FORMAT_VERSION, MANIFEST, VIDEOS_SPLIT
from drl_jax.data.storage import StorageSpec
from drl_jax.data.tokens import store_tokens
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.models.tokenizers.base import warn_of_cut
from drl_jax.runtime.files import write_json
from drl_jax.runtime.worker_pool import OrderedMap, WorkerFailure, map_in_processes

_VIDEOS_PER_SHARD = 1000
# Packages that a build uses, besides those of the decoder.
_PACKAGES = ("numpy", "pyarrow", "tensorflow-datasets", "drl_jax")
_REMEDY = "copy them again, or let data_prep.check list them, and the build then leaves them out"


class RetrievalBuilder(FileReaderBuilder, abc.ABC, skip_registration=True):  # type: ignore[call-arg]
    """Stores every video of a dataset once, and its splits as metadata.

    Its TFDS configuration has the name of a storage variant.
    """

    VERSION = tfds.core.Version(FORMAT_VERSION)
    # Storage variant of a build without flags, and of the dataset's training configuration.
    DEFAULT_STORAGE: ClassVar[StorageSpec] = StorageSpec(FrameForm(224), 12, "jpeg")
    # Tokens per caption in the dataset's training configuration.
    MAX_WORDS: ClassVar[int] = 32
    PUBLISHED: ClassVar[PublishedSizes] = {}
    # What publications call the protocol of a split.
    PROTOCOL_NAMES: ClassVar[Mapping[str, str]] = {}
    # Splits that are used together, and so must not share videos; empty: all of them.
    PROTOCOLS: ClassVar[Sequence[Collection[str]]] = ()
    # Whether decoded frames are cached, for a build with other annotations or after an accident.
    HAS_CACHE: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any):
        # `data_prep.datasets` is the registry; TFDS refuses two classes of one name.
        super().__init_subclass__(skip_registration=True, **options)

    @classmethod
    @abc.abstractmethod
    def read_annotations(cls, path: Path) -> Annotations:
        """Reads the annotation files below a directory (for `custom`, the file or files)."""

    @property
    def _storage(self) -> StorageSpec:
        return StorageSpec.from_name(self.builder_config.name)

    def _info(self) -> tfds.core.DatasetInfo:
        features, shape = tfds.features, self._storage.form.shape
        if self._storage.encoding == "raw":
            # The default encoding of a Tensor stores bytes as varints: larger, and 15 times slower.
            encoding = features.Encoding.BYTES
            frames = features.Tensor(shape=(None, *shape), dtype=np.uint8, encoding=encoding)
        else:
            frames = features.Sequence(features.Image(shape=shape, encoding_format="jpeg"))
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=features.FeaturesDict({"video_id": features.Text(), "frames": frames}),
            metadata=tfds.core.MetadataDict(),
            # The metadata refers to records by index.
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        raise AnnotationError(
            f"build this dataset with: python -m data_prep.build {self.name} --videos=DIR"
            " --annotations=DIR --data_dir=DIR"
        )

    def store(
        self, plan: Plan, cache_dir: Path, timeout: float, map_calls: OrderedMap = map_in_processes
    ) -> dict[str, str]:
        """Decodes the videos and writes the dataset into `data_dir`; arguments as `decode_clips`.

        Returns why videos could not be decoded that may be sound, by id; the dataset is complete
        only if there are none. Records are written sequentially: `download_and_prepare` would
        collect all of them first, and sort them in memory.

        Raises:
          AnnotationError: no video can be used, or more than `MAX_LOST` cannot.
          OSError, RuntimeError: the disk is full.
        """
        directory = Path(self.data_dir)
        directory.mkdir(parents=True)
        records: dict[str, int] = {}
        unusable, unavailable = dict(plan.unusable), {}
        content = hashlib.sha256()
        writer = _StableWriter(
            self.info, max_examples_per_shard=_VIDEOS_PER_SHARD, file_format="array_record"
        )
        writer.initialize_splits([VIDEOS_SPLIT])
        cache = FrameCache(cache_dir if self.HAS_CACHE else None, self._storage)
        decoded = decode_clips(plan.clips, cache=cache, timeout=timeout, map_calls=map_calls)
        clips = tqdm(plan.clips, "decoding", unit="video")
        with contextlib.closing(decoded):
            for clip, frames in zip(clips, decoded, strict=True):
                if isinstance(frames, WorkerFailure):
                    failed = unavailable if frames.is_passing else unusable
                    failed[clip.video_id] = frames.reason
                    continue
                records[clip.video_id] = len(records)
                content.update(clip.video_id.encode() + b"\0")
                for frame in frames:
                    content.update(frame)
                if self._storage.encoding == "jpeg":
                    files = [io.BytesIO(jpeg) for jpeg in frames]
                    example = {"video_id": clip.video_id, "frames": files}
                    writer.add_examples({VIDEOS_SPLIT: [example]})
                else:
                    example = {"video_id": clip.video_id, "frames": frames}
                    writer.add_raw_example(VIDEOS_SPLIT, example)
        if unavailable:
            return unavailable
        # What is absent or in quarantine is no loss: a part of a dataset may be built.
        lost = {name: why for name, why in unusable.items() if name not in plan.unusable}
        check_lost(lost if records else unusable, len(records), "annotated videos", _REMEDY)
        metadata = write_description(directory, plan, records)
        self.info.metadata.update(metadata)
        writer.close_all()
        self._write_manifest(plan, metadata, records, unusable, content.hexdigest())
        return {}

    def _write_manifest(
        self,
        plan: Plan,
        metadata: Mapping[str, Any],
        records: Mapping[str, int],
        unusable: Mapping[str, str],
        content: str,
    ) -> None:
        """Completes a dataset that has its records and descriptions; stores its tokens, too."""
        directory, storage = Path(self.data_dir), self._storage
        counts = count_splits(plan.annotations, records, self.PUBLISHED)
        for name in counts.keys() & self.PROTOCOL_NAMES.keys():
            counts[name]["protocol"] = self.PROTOCOL_NAMES[name]
        files = file_hashes([*directory.glob("*.json"), *directory.glob("*.arrow")])
        splits = {
            name: read_split(directory, name, split["reversed_pairs"], files)
            for name, split in metadata["splits"].items()
        }
        for name, split in splits.items():
            cut = store_tokens(split.captions, CLIPTokenizer(), self.MAX_WORDS)
            where = f"split {name}, with CLIP's tokenizer"
            warn_of_cut(cut, len(split.captions.texts), self.MAX_WORDS, where)
        manifest = {
            "dataset": self.name,
            "settings": {
                "image_size": storage.form.size,
                "max_frames": storage.max_frames,
                "storage": storage.encoding,
                "frame_clock": storage.frame_clock,
                **storage.form.changed_fields(),
            },
            "annotations": annotation_hashes(plan.annotations),
            "missing_files": plan.annotations.missing_files,
            "content": content,
            "files": files,
            "videos": len(records),
            "left_out": dict(unusable),
            "splits": counts,
            "versions": {
                "python": platform.python_version(),
                "ffmpeg": av.ffmpeg_version_info,
                **decoder_versions(),
                **{package: importlib.metadata.version(package) for package in _PACKAGES},
            },
            "content_with_captions": content_sha256(content, records, splits),
        }
        write_json(directory / MANIFEST, manifest)


class _StableWriter(tfds.core.SequentialWriter):
    """Writes the same bytes in every process, and the description of the dataset once.

    A tf.Example contains a map, and by default protobuf serialises a map in an order that differs
    between processes.
    """

    def __init__(self, ds_info: tfds.core.DatasetInfo, **settings: Any):
        super().__init__(ds_info, **settings)
        self._serializer = _StableSerializer(ds_info.features.get_serialized_info())
        self._complete = False

    def add_raw_example(self, split_name: str, example: Mapping[str, Any]) -> None:
        """Adds an example with raw frames, in a file that is not compressed.

        They shrink by a fifth, and two thirds of the time of reading would be decompression.
        """
        split = self._splits[split_name]
        if split.current_shard is None:
            number = split.complete_shards
            path = split.info.filename_template.sharded_filepath(
                shard_index=number, num_shards=None
            )
            writer = ArrayRecordWriter(os.fspath(path), "group_size:1,uncompressed")
            split.current_shard = Shard(writer=writer)
        self.add_examples({split_name: [example]})

    def close_all(self) -> None:
        """Closes the last file and describes the dataset."""
        self._complete = True
        super().close_all()

    def _write_splits_metadata(self) -> None:
        # The base class rewrites it, with the length of every shard, after each call.
        if self._complete:
            super()._write_splits_metadata()


class _StableSerializer(ExampleSerializer):
    def serialize_example(self, example: Any) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)
