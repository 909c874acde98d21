"""TFDS builder that all text-video retrieval datasets share.

The builder of a dataset reads its annotation files (`read_annotations`); this one finds, decodes
and stores the videos.
"""

import abc
import contextlib
import dataclasses
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import FileReaderBuilder
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tqdm import tqdm

from data_prep.annotations import AnnotationError, Annotations
from data_prep.decode import Decoded, decode_clips
from data_prep.descriptions import write_description
from data_prep.frame_cache import FrameCache
from data_prep.left_out import check_lost
from data_prep.locations import Clip
from data_prep.manifest import ContentHash, PublishedSizes, make_manifest
from data_prep.video_folder import Plan
from drl_jax.data.description import Description
from drl_jax.data.frame_form import FrameForm
from drl_jax.data.records import FORMAT_VERSION, MANIFEST, VIDEOS_SPLIT
from drl_jax.data.storage import StorageSpec
from drl_jax.data.tokens import store_tokens
from drl_jax.models.tokenizers import CLIPTokenizer
from drl_jax.models.tokenizers.base import warn_of_cut
from drl_jax.runtime.files import write_json
from drl_jax.runtime.worker_pool import OrderedMap, map_in_processes

_VIDEOS_PER_SHARD = 1000
_REMEDY = "copy them again, or let data_prep.check list them, and the build then leaves them out"


@dataclasses.dataclass(eq=False)
class StorageConfig(tfds.core.BuilderConfig):
    """TFDS configuration of a storage variant, named after it."""

    spec: StorageSpec = dataclasses.field(kw_only=True)

    @classmethod
    def of(cls, spec: StorageSpec) -> "StorageConfig":
        return cls(name=spec.name, spec=spec)


class RetrievalBuilder(FileReaderBuilder, abc.ABC, skip_registration=True):  # type: ignore[call-arg]
    """Stores every video of a dataset once, and its splits as metadata."""

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
    # Whether decoded frames stay cached after a build, for a build with other annotations.
    KEEPS_CACHE: ClassVar[bool] = True

    @classmethod
    @abc.abstractmethod
    def read_annotations(cls, path: Path) -> Annotations:
        """Reads the annotation files.

        Args:
          path: their directory (for `custom`, the file or files).

        Raises:
          AnnotationError: they cannot be used.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        storage = self.builder_config.spec
        shape = storage.form.shape
        if storage.encoding == "raw":
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
            # The metadata refers to records by index.
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any) -> None:
        raise AnnotationError(
            f"build this dataset with: python -m data_prep.build {self.name} --videos=DIR"
            " --annotations=DIR --data_dir=DIR"
        )

    def store(
        self,
        plan: Plan,
        cache_dir: Path,
        timeout: float,
        map_calls: OrderedMap = map_in_processes,
    ) -> dict[str, str]:
        """Decodes the videos and writes the dataset into `data_dir`.

        Records are written sequentially. (`download_and_prepare` collects all records first and,
        even without shuffling, sorts what exceeds 1 GB in memory.)

        Args:
          plan: the videos and captions to store.
          cache_dir: directory of the cache of decoded frames.
          timeout: maximum seconds to decode one video.
          map_calls: runs the decoders, see `decode_clips`.

        Returns:
          By id, why videos could not be decoded that may be sound. The dataset is complete only if
          there are none.

        Raises:
          AnnotationError: no video can be used, or more than `MAX_LOST` cannot.
          OSError, RuntimeError: the disk is full.
        """
        directory = Path(self.data_dir)
        directory.mkdir(parents=True)
        storage, annotations = self.builder_config.spec, plan.annotations
        unusable, unavailable = dict(plan.unusable), {}
        writer = _StableWriter(
            self.info, max_examples_per_shard=_VIDEOS_PER_SHARD, file_format="array_record"
        )
        writer.initialize_splits([VIDEOS_SPLIT])
        records: dict[str, int] = {}
        content = ContentHash()
        cache = FrameCache(cache_dir, storage)
        decoded = decode_clips(plan.clips, cache=cache, timeout=timeout, map_calls=map_calls)
        with contextlib.closing(decoded):
            examples = self._examples(plan.clips, decoded, records, unusable, unavailable, content)
            for example in examples:
                writer.add_examples({VIDEOS_SPLIT: [example]})
        if unavailable:
            return unavailable
        # What is absent or in quarantine is no loss: a part of a dataset may be built.
        lost = {name: why for name, why in unusable.items() if name not in plan.unusable}
        check_lost(lost if records else unusable, len(records), "annotated videos", _REMEDY)
        metadata = write_description(directory, plan, records)
        self.info.metadata.update(metadata)
        writer.close_all()
        manifest = make_manifest(
            self.name,
            storage,
            annotations,
            records,
            unusable,
            self.PUBLISHED,
            content,
            directory,
            protocols=self.PROTOCOL_NAMES,
        )
        description = Description(directory, metadata, manifest["files"])
        manifest["content_with_captions"] = description.content(manifest["content"])
        for name in description.split_names:
            captions = description.split(name).captions
            cut = store_tokens(captions, CLIPTokenizer(), self.MAX_WORDS)
            where = f"split {name}, with CLIP's tokenizer"
            warn_of_cut(cut, len(captions.texts), self.MAX_WORDS, where)
        write_json(directory / MANIFEST, manifest)
        return {}

    def _examples(
        self,
        clips: list[Clip],
        decoded: Iterator[Decoded],
        records: dict[str, int],
        unusable: dict[str, str],
        unavailable: dict[str, str],
        content: ContentHash,
    ) -> Iterator[dict[str, Any]]:
        """Yields a record for each decoded clip; updates the other arguments."""
        progress = tqdm(zip(clips, decoded, strict=True), "decoding", len(clips), unit="video")
        for clip, result in progress:
            frames = result.frames
            if frames is None:
                (unavailable if result.is_passing else unusable)[clip.video_id] = result.error
                continue
            records[clip.video_id] = len(records)
            content.update(clip.video_id, frames)
            if self.builder_config.spec.encoding == "jpeg":
                frames = [io.BytesIO(jpeg) for jpeg in frames]
            yield {"video_id": clip.video_id, "frames": frames}


class _StableWriter(tfds.core.SequentialWriter):
    """Writes the same bytes in every process, and the description of the dataset once.

    A tf.Example contains a map, and by default protobuf serialises a map in an order that differs
    between processes.
    """

    def __init__(self, ds_info: tfds.core.DatasetInfo, **settings: Any):
        super().__init__(ds_info, **settings)
        self._serializer = _StableSerializer(ds_info.features.get_serialized_info())
        self._complete = False

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
