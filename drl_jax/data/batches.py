"""Training batches of a built dataset, and its splits.

A batch has `text_ids` int32 [B, L], `text_mask` bool [B, L], `frames` uint8 [B, F, H, W, 3] and
`frame_mask` bool [B, F] (the reference calls the last two `video` and `video_mask`).
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from drl_jax.config import DataConfig
from drl_jax.data.frames import DeviceFrames, DiskFrames, MemoryFrames, choose_cache, reader_threads
from drl_jax.data.records import DatasetError, VideoDataset
from drl_jax.data.splits import Split
from drl_jax.data.tokens import caption_tokens
from drl_jax.models.tokenizers import Tokenizer
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.sharding import Layout


def load_split(dataset: VideoDataset, name: str, config: DataConfig) -> Split:
    """Loads a split by its role (`train`, `val` or `test`) or by its stored name.

    With `config.holdout`, `val` is that many videos of the training split, chosen by the hash of
    their ids, with the first caption of each; `train` is the rest. All videos of a file are in the
    same one, so there can be a few more.

    Raises:
      DatasetError: the dataset has no such split, or too few videos to hold out.
    """
    stored = {"train": config.train_split, "val": config.val_split, "test": config.test_split}
    if not config.holdout or name not in ("train", "val"):
        return dataset.split(stored.get(name, name))
    full = dataset.split(config.train_split)
    held_out = _held_out(dataset, full.videos, min(config.holdout, len(full.videos)))
    if len(held_out) == len(full.videos):
        raise DatasetError(
            f"config.data.holdout={config.holdout} leaves nothing to train on:"
            f" {config.train_split} has {len(full.videos)} videos"
        )
    rows = held_out if name == "val" else np.delete(np.arange(len(full.videos)), held_out)
    captions = full.captions.subset(rows, first_only=name == "val")
    return Split(full.videos[rows], captions, np.zeros((0, 2), np.int32))


def _held_out(dataset: VideoDataset, videos: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of `count` videos with the smallest SHA-256, and all of their files."""
    hashes = dataset.id_hashes[videos]
    # Those whose first bytes are small enough are few; the whole hashes decide between them.
    candidates = np.flatnonzero(hashes <= np.partition(hashes, count - 1)[count - 1])

    def whole_hash(row: int) -> bytes:
        return hashlib.sha256(dataset.video_ids[videos[row]].encode()).digest()

    first = np.array(sorted(candidates, key=whole_hash)[:count])
    rows = np.flatnonzero(np.isin(videos, dataset.sources.of_same_files(videos[first])))
    if len(rows) == count:
        return rows
    by_file: dict[str, list[int]] = {}
    for row in rows:
        by_file.setdefault(dataset.sources[videos[row]][0], []).append(row)
    held: list[int] = []
    for row in first:
        if len(held) < count:
            held += by_file.pop(dataset.sources[videos[row]][0], [])
    return np.sort(held)


# Batches that are read ahead of the step.
PREFETCHED_BATCHES = 4


class TrainBatches:
    """Training batches, starting at any step.

    The order depends only on the seed and the step. A checkpoint therefore stores only the step,
    and the order is the same for any number of processes or threads.

    Attributes:
      num_examples: pairs, or videos, of an epoch.
      cache: where frames are kept, see `DataConfig.cache`; not `auto`, but `features` with those.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        split: Split,
        config: DataConfig,
        batch_size: int,
        seed: int,
        tokenizer: Tokenizer,
        features: Any = None,
    ):
        """Tokenises the captions, unless their tokens are stored (`caption_tokens`).

        `batch_size` is that of the global batch; `seed` determines order and drawn captions. With
        `features`, a `runs.stored_features.StoredFeatures`, batches have those in place of pixels
        and ids (`training.train_step.loss_and_parts`).

        Raises:
          DatasetError: the split has fewer examples than a batch, or does not fit in the cache.
        """
        self._dataset, self._split, self._captions = dataset, split, split.captions
        self._config, self._batch_size, self._seed = config, batch_size, seed
        self.num_examples = self._captions.pairs if config.expand_captions else len(split.videos)
        if self.num_examples < batch_size:
            raise DatasetError(
                f"{config.train_split} has {self.num_examples} examples, fewer than a batch"
                f" (config.train.batch_size={batch_size})"
            )
        self._threads = reader_threads(config.num_threads)
        if features is not None:
            self._frames, self.cache = features, "features"
            self._tokens = features.of_captions(self._captions)
            return
        self._frames = DiskFrames(dataset, config.max_frames)
        frame_bytes = len(split.videos) * self._frames.read(split.videos[0])[0].nbytes
        self.cache = choose_cache(config.cache, frame_bytes)
        if self.cache == "memory":
            self._frames = MemoryFrames(dataset, np.unique(split.videos), config.max_frames)
        # Last, since it may take long.
        quiet = not is_main()
        self._tokens = caption_tokens(self._captions, tokenizer, config.max_words, quiet=quiet)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches per epoch; each epoch leaves out the remaining examples of its shuffle."""
        return self.num_examples // self._batch_size

    def on_devices(self, start_step: int, layout: Layout) -> Iterator[dict[str, jax.Array]]:
        """Yields the global batches from `start_step` on, on the devices, indefinitely.

        DatasetError if `cache` is "device" and the frames do not fit on the devices.
        """
        fill = None
        if self.cache == "device":
            videos, max_frames = self._split.videos, self._config.max_frames
            fill = DeviceFrames(self._dataset, videos, max_frames, layout, self._threads).fill
        stream = self.iterate(start_step, jax.process_index(), jax.process_count())
        # Steps are asynchronous: a batch is read and transferred while the previous step runs,
        # unless the caller waits for that step first.
        for rows in stream:
            batch = layout.put_batch(rows)
            yield fill(batch) if fill else batch

    def iterate(self, start_step: int, process: int, processes: int) -> Iterator[dict]:
        """Iterates over this process's part of each batch from `start_step` on, indefinitely.

        With `cache` = "device" a batch has `video_index` int32 [B], indices of the videos in the
        split, instead of frames.
        """
        examples = self._in_order(self._read)
        # Process p reads the p-th part of each batch, so that the order of a batch's rows is the
        # same for any number of processes.
        # Of the endless order there is no remainder; without the argument, its number of batches is
        # rounded up in floating point, for one example a batch beyond what `len` can return.
        parts = examples.batch(self._batch_size // processes, drop_remainder=True)
        own_parts = parts[start_step * processes + process :: processes]
        options = grain.ReadOptions(self._threads, PREFETCHED_BATCHES)
        return iter(own_parts.to_iter_dataset(options))

    def examples(self, step: int) -> list[dict[str, str]]:
        """`video_id` and `caption` of each row of the global batch of a training step, from 1."""
        pairs, end = self._in_order(self._pair), step * self._batch_size
        found = []
        for pair in (pairs[row] for row in range(end - self._batch_size, end)):
            row, text = self._captions.locate(pair)
            video_id = self._dataset.video_ids[self._split.videos[row]]
            found.append({"video_id": video_id, "caption": self._captions.texts[text]})
        return found

    def _in_order(self, function: Callable) -> grain.MapDataset:
        """Results of `function(example, rng)` in the order of training."""
        epoch_size = self.steps_per_epoch * self._batch_size
        return (
            grain.MapDataset.range(self.num_examples)
            .seed(self._seed)
            .shuffle()[:epoch_size]
            .repeat(None)
            .random_map(function)
        )

    def _pair(self, example: int, rng: np.random.Generator) -> int:
        """Index of the (video, caption) pair of an example."""
        if self._config.expand_captions:
            return int(example)
        first, end = self._captions.offsets[example : example + 2]
        return int(first + rng.integers(end - first))

    def _read(self, example: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        row, text_row = self._captions.locate(self._pair(example, rng))
        text_ids, text_mask = self._tokens[text_row]
        text = {"text_ids": text_ids, "text_mask": text_mask}
        if self.cache == "device":
            return {**text, "video_index": np.int32(row)}
        frames, mask = self._frames.read(self._split.videos[row])
        return {**text, "frames": frames, "frame_mask": mask}
