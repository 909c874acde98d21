"""Retrieval evaluation on a split of a dataset."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from drl_jax.config import Config
from drl_jax.data.frames import reader_threads
from drl_jax.data.records import VideoDataset
from drl_jax.data.splits import Split
from drl_jax.evaluation.embedder import Embedder
from drl_jax.evaluation.metrics import Ranks, metrics_of, query_ranks
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.tokenizers.base import Tokenizer, warn_of_cut
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.sharding import Layout

# uint8 [F, H, W, 3] -> the same shape.
FrameOrder = Callable[[np.ndarray], np.ndarray]


class SplitError(UserError):
    """A split on which metrics mean nothing."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    metrics: dict[str, Any]  # of `metrics.metrics_of`
    sim_matrix: np.ndarray  # float32 [A, B], captions (`Split.caption_pairs`) by videos
    ranks: Ranks
    text: Features  # the interaction's arrays of the captions, and those of the videos
    video: Features


class Evaluator:
    """Evaluates parameters on splits of a dataset; compiled once."""

    def __init__(self, config: Config, dataset: VideoDataset, layout: Layout, features: Any = None):
        """`features`, `runs.stored_features.StoredFeatures`, are used in place of the towers."""
        self._features = features
        self._dataset, self._num_threads = dataset, reader_threads(config.data.num_threads)
        self.embedder = Embedder(config, layout)

    def run(
        self, params: Params, split: Split, *, frame_order: FrameOrder | None = None
    ) -> Evaluation:
        """Encodes and ranks a split; `frame_order` is applied to the frames of each video."""
        text_to_video, captions = split.caption_pairs()
        text = self.encode_captions(params, captions)
        video = self.encode_videos(params, split.videos, frame_order=frame_order)
        sim_matrix = self.embedder.similarity(params, text, video)
        ranks = query_ranks(sim_matrix, text_to_video, split.reversed_pairs)
        return Evaluation(metrics_of(ranks), sim_matrix, ranks, text, video)

    def encode_captions(self, params: Params, captions: list[str]) -> Features:
        """N captions -> the interaction's arrays, [N, ...] each."""
        source = self.embedder.tokenize if self._features is None else self._features.tokenized
        return self.embedder.encode_text(params, source(captions))

    def encode_videos(
        self, params: Params, videos: np.ndarray, *, frame_order: FrameOrder | None = None
    ) -> Features:
        """Videos of the dataset, record indices int [N], -> the interaction's arrays."""
        if self._features is not None and frame_order is None:
            rows = [self._features.frames(video) for video in videos]
            ends = np.cumsum([len(row) for row in rows])
            windows = [range(end - len(row), end) for row, end in zip(rows, ends, strict=True)]
            return self.embedder.encode_windows(params, np.concatenate(rows), windows)

        def read_one(video: int) -> np.ndarray:
            frames = self._dataset.read_frames(video)
            return frames if frame_order is None else frame_order(frames)

        def read(rows: np.ndarray) -> list[np.ndarray]:
            return list(pool.map(read_one, videos[rows]))

        with ThreadPoolExecutor(self._num_threads) as pool:
            return self.embedder.encode_video(params, read, len(videos))


def check_split(
    name: str, split: Split, dataset: VideoDataset, tokenizer: Tokenizer, max_words: int
) -> None:
    """Checks that the captions and videos of a split can be ranked; says how many are cut.

    Raises:
      SplitError: it has a single video, or a caption of which the tokenizer leaves no word.
    """
    if len(split.videos) < 2:
        raise SplitError(
            f"the split {name} of {dataset.directory} has {len(split.videos)} video(s); metrics"
            " need at least two, since the only one always ranks first"
        )
    text_to_video, captions = split.caption_pairs()
    # A caption without words has the tokens of an empty one.
    text_ids, text_mask, is_cut = tokenizer.tokenize(["", *captions], max_words)
    tokens = text_ids.reshape(len(text_ids), -1)
    empty = (tokens == tokens[0]).all(axis=1) & (text_mask == text_mask[0]).all(axis=1)
    if empty[1:].any():
        row = int(np.argmax(empty[1:]))
        video = dataset.video_ids[split.videos[text_to_video[row]]]
        raise SplitError(
            f"the split {name} of {dataset.directory} has a caption without words, of the video"
            f" {video}: {captions[row]!r}; correct the annotations and build the dataset again"
        )
    if is_main():
        warn_of_cut(int(is_cut.sum()), len(captions), max_words, f"split {name}")


def order_by_content(frames: np.ndarray) -> np.ndarray:
    """Sorts frames by their pixels, so that a clip and its reverse become the same."""
    return np.stack(sorted(frames, key=lambda frame: frame.tobytes()))
