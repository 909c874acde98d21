"""Retrieval evaluation on a split of a dataset."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from drl_jax.config import Config
from drl_jax.data.frames import reader_threads
from drl_jax.data.records import Split, VideoDataset
from drl_jax.evaluation.embedder import Embedder
from drl_jax.evaluation.metrics import pair_accuracy, retrieval_metrics
from drl_jax.models.drl import Params
from drl_jax.sharding import Layout

# uint8 [F, H, W, 3] -> the same shape.
FrameOrder = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation.

    Attributes:
      metrics: {"t2v": .., "v2t": ..} of `drl_jax.evaluation.metrics`, and "pair_accuracy" where the
        split has pairs of a clip and its reverse.
      sim_matrix: float32 [A, B], captions by videos.
    """

    metrics: dict[str, Any]
    sim_matrix: np.ndarray


class Evaluator:
    """Evaluates parameters on splits of a dataset; compiled once."""

    def __init__(self, config: Config, dataset: VideoDataset, layout: Layout):
        self._dataset, self._num_threads = dataset, reader_threads(config.data.num_threads)
        self._embedder = Embedder(config, layout)

    def run(
        self, params: Params, split: Split, *, frame_order: FrameOrder | None = None
    ) -> Evaluation:
        """Computes the metrics of a split.

        Args:
          params: the model's parameters.
          split: captions and their videos.
          frame_order: applied to the frames of each video before they are encoded.

        Returns:
          The metrics and the similarities.
        """
        text_to_video, captions = split.caption_pairs()

        def read_one(video: int) -> np.ndarray:
            frames = self._dataset.read_frames(video)
            return frames if frame_order is None else frame_order(frames)

        def read(rows: np.ndarray) -> list[np.ndarray]:
            return list(pool.map(read_one, split.videos[rows]))

        text = self._embedder.encode_text(params, captions)
        with ThreadPoolExecutor(self._num_threads) as pool:
            video = self._embedder.encode_video(params, read, len(split.videos))
        sim_matrix = self._embedder.similarity(params, text, video)
        metrics: dict[str, Any] = retrieval_metrics(sim_matrix, text_to_video)
        if len(split.reversed_pairs):
            metrics["pair_accuracy"] = pair_accuracy(
                sim_matrix, text_to_video, split.reversed_pairs
            )
        return Evaluation(metrics, sim_matrix)


def order_by_content(frames: np.ndarray) -> np.ndarray:
    """Sorts frames by their pixels, so that a clip and its reverse become the same."""
    return np.stack(sorted(frames, key=lambda frame: frame.tobytes()))
