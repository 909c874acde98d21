"""Batches of a built dataset, for training and for evaluation.

A batch is `text_ids` int32 [B, L], `text_mask` bool [B, L], `frames` uint8 [B, F, H, W, 3] and
`frame_mask` bool [B, F] (the reference calls the last two `video` and `video_mask`).
"""

import hashlib
from collections.abc import Iterator

import grain
import jax
import numpy as np

from drl_jax.config import DataConfig
from drl_jax.data.frames import DeviceFrames, DiskFrames, MemoryFrames, to_devices
from drl_jax.data.records import DatasetError, Split, VideoDataset
from drl_jax.models.tokenizer import tokenize
from drl_jax.sharding import Layout

HOLDOUT = "holdout"


def load_split(dataset: VideoDataset, name: str, config: DataConfig) -> Split:
    """A split by its role, `train`, `val` or `test`, or by the name it is stored under.

    With `config.holdout`, `val` is that many videos of the training split, chosen by the hash of
    their names, with the first caption of each; `train` is the rest.

    Raises:
      DatasetError: the dataset has no such split, or too few videos to hold out.
    """
    stored = {"train": config.train_split, "val": config.val_split, "test": config.test_split}
    if not config.holdout or name not in ("train", "val"):
        return dataset.split(stored.get(name, name))
    whole = dataset.split(config.train_split)
    if config.holdout >= len(whole.videos):
        raise DatasetError(
            f"config.data.holdout={config.holdout} leaves nothing to train on:"
            f" {config.train_split} has {len(whole.videos)} videos"
        )
    ids = dataset.video_ids
    by_hash = sorted(
        range(len(whole.videos)),
        key=lambda row: hashlib.sha256(ids[whole.videos[row]].encode()).digest(),
    )
    if name == "val":
        kept = sorted(by_hash[: config.holdout])
        captions = [whole.captions[row][:1] for row in kept]
    else:
        kept = sorted(by_hash[config.holdout :])
        captions = [whole.captions[row] for row in kept]
    return Split(whole.videos[kept], captions, np.zeros((0, 2), np.int32))


class TrainBatches:
    """The training batches from any step on.

    The order is a function of the seed and the position alone, so a checkpoint needs no more than
    the step, and any number of processes or threads sees the same order.
    """

    def __init__(
        self, dataset: VideoDataset, split: Split, config: DataConfig, batch_size: int, seed: int
    ):
        """Tokenises the captions; `config.cache` says where frames come from.

        Raises:
          DatasetError: the split has fewer examples than a batch, or does not fit in the cache.
        """
        owners, captions = split.caption_pairs()
        self._dataset, self._split, self._config, self._seed = dataset, split, config, seed
        self._owners = owners
        self._videos = split.videos[owners]
        self._text_ids, self._text_mask = tokenize(captions, config.max_words)
        # First caption and number of captions of each video.
        self._counts = split.caption_counts()
        self._firsts = np.concatenate([[0], np.cumsum(self._counts)[:-1]])
        self._batch_size = batch_size
        self.num_examples = len(captions) if config.expand_captions else len(split.videos)
        if self.num_examples < batch_size:
            raise DatasetError(
                f"{config.train_split} has {self.num_examples} examples, fewer than a batch"
                f" (config.train.batch_size={batch_size})"
            )
        self._frames = DiskFrames(dataset, config.max_frames)
        if config.cache == "memory":
            self._frames = MemoryFrames(dataset, np.unique(split.videos), config.max_frames)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch; the few examples left over wait for the next shuffle."""
        return self.num_examples // self._batch_size

    def on_devices(self, start_step: int, layout: Layout) -> Iterator[dict[str, jax.Array]]:
        """The global batches from `start_step` on, without end, on the devices.

        Raises:
          DatasetError: the frames do not fit on the devices, with `config.cache` = "device".
        """
        fill = None
        if self._config.cache == "device":
            fill = DeviceFrames(
                self._dataset,
                self._split.videos,
                self._config.max_frames,
                layout,
                self._config.num_threads,
            ).fill
        stream = self.iterate(start_step, jax.process_index(), jax.process_count())
        yield from to_devices(stream, layout, fill)

    def iterate(self, start_step: int, process: int, processes: int) -> Iterator[dict]:
        """This process's part of each batch from `start_step` on, without end.

        With `config.cache` = "device" it has `video` int32 [B], the place of the video in the
        split, instead of frames.
        """
        epoch_size = self.steps_per_epoch * self._batch_size
        examples = (
            grain.MapDataset.range(self.num_examples)
            .seed(self._seed)
            .shuffle()[:epoch_size]
            .repeat(None)
            .random_map(self._read)
        )
        # Process p's part is the p-th piece of each batch, so the order of a batch's rows, too, is
        # the same for any number of processes.
        pieces = examples.batch(self._batch_size // processes)
        mine = pieces[start_step * processes + process :: processes]
        options = grain.ReadOptions(num_threads=self._config.num_threads, prefetch_buffer_size=4)
        return iter(mine.to_iter_dataset(options))

    def _read(self, example: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        pair = example
        if not self._config.expand_captions:
            pair = self._firsts[example] + rng.integers(self._counts[example])
        text = {"text_ids": self._text_ids[pair], "text_mask": self._text_mask[pair]}
        if self._config.cache == "device":
            return {**text, "video": self._owners[pair]}
        frames, mask = self._frames.read(self._videos[pair])
        return {**text, "frames": frames, "frame_mask": mask}
