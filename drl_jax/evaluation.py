"""Retrieval evaluation: every caption and every video is embedded once, then compared in blocks."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from drl_jax.config import Config, ConfigError
from drl_jax.data.batches import pad_frames
from drl_jax.data.records import Split, VideoDataset
from drl_jax.metrics import pair_accuracy, retrieval_metrics
from drl_jax.models.drl import Params
from drl_jax.sharding import shard_rows
from drl_jax.steps import make_embed_steps
from drl_jax.tokenizer import VOCABULARY_SIZE, tokenize

Features = dict[str, np.ndarray]
# uint8 [F, H, W, 3] -> the same shape.
FrameOrder = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      metrics: {"t2v": .., "v2t": ..} of `drl_jax.metrics`, and "pair_accuracy" where the split has
        clips together with their reverses.
      sim_matrix: float32 [A, B], captions by videos.
    """

    metrics: dict[str, Any]
    sim_matrix: np.ndarray


class Evaluator:
    """Evaluates parameters on splits of a dataset; compiles once."""

    def __init__(self, config: Config, dataset: VideoDataset, mesh: Mesh):
        if config.model.clip.vocab_size < VOCABULARY_SIZE:
            raise ConfigError(
                f"config.model.clip.vocab_size={config.model.clip.vocab_size} is too small for"
                f" CLIP's tokeniser, which has {VOCABULARY_SIZE} tokens"
            )
        self._config, self._dataset, self._mesh = config, dataset, mesh
        self._encode_text, self._encode_frames, self._similarity = make_embed_steps(
            config.model, mesh
        )

    def run(
        self, params: Params, split: Split, *, frame_order: FrameOrder | None = None
    ) -> Evaluation:
        """Metrics of a split.

        Args:
          params: the model's parameters.
          split: captions and their videos.
          frame_order: applied to the frames of each video before it is embedded.

        Returns:
          The metrics and the similarities they come from.
        """
        text_to_video, captions = split.caption_pairs()
        text = self.embed_captions(params, captions)
        video = self.embed_videos(params, split.videos, frame_order=frame_order)
        sim_matrix = self.similarity(params, text, video)
        metrics: dict[str, Any] = retrieval_metrics(sim_matrix, text_to_video)
        if len(split.reversed_pairs):
            metrics["pair_accuracy"] = pair_accuracy(
                sim_matrix, text_to_video, split.reversed_pairs
            )
        return Evaluation(metrics, sim_matrix)

    def embed_captions(self, params: Params, captions: list[str]) -> Features:
        """N captions -> the arrays of `DRL.encode_text`, on the host."""
        text_ids, text_mask = tokenize(captions, self._config.data.max_words)
        batches = (
            {"text_ids": text_ids[rows], "text_mask": text_mask[rows]}
            for rows in _slices(len(captions), self._rows(self._config.eval.batch_size))
        )
        return self._embed(params, self._encode_text, batches, len(captions), "captions")

    def embed_videos(
        self, params: Params, videos: np.ndarray, *, frame_order: FrameOrder | None = None
    ) -> Features:
        """Positions of N stored videos -> the arrays of `DRL.encode_frames`, on the host."""

        def read(video: int) -> tuple[np.ndarray, np.ndarray]:
            frames = self._dataset.read_frames(video)
            if frame_order is not None:
                frames = frame_order(frames)
            return pad_frames(frames, self._config.data.max_frames)

        def batches() -> Iterator[Features]:
            with ThreadPoolExecutor(self._config.data.num_threads) as pool:
                for rows in _slices(len(videos), self._rows(self._config.eval.batch_size)):
                    frames, masks = zip(*pool.map(read, videos[rows]), strict=True)
                    yield {"frames": np.stack(frames), "frame_mask": np.stack(masks)}

        return self._embed(params, self._encode_frames, batches(), len(videos), "videos")

    def _rows(self, wanted: int, available: int | None = None) -> int:
        """Rows of a batch: those wanted or available, rounded up to what the devices divide."""
        rows = wanted if available is None else min(wanted, available)
        devices = self._mesh.devices.size
        return -(-rows // devices) * devices

    def _embed(
        self,
        params: Params,
        encode: Callable[..., dict[str, jax.Array]],
        batches: Iterator[Features],
        count: int,
        unit: str,
    ) -> Features:
        parts, size = [], self._rows(self._config.eval.batch_size, count)
        with tqdm(total=count, desc=f"embedding {unit}", unit=unit[:-1], leave=False) as progress:
            for batch in batches:
                rows = len(next(iter(batch.values())))
                # One shape, one compilation: the last batch repeats its last row.
                padded = {name: _pad_rows(array, size) for name, array in batch.items()}
                feat = encode(params, *shard_rows(padded, self._mesh).values())
                parts.append({name: np.asarray(array)[:rows] for name, array in feat.items()})
                progress.update(rows)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def similarity(self, params: Params, text: Features, video: Features) -> np.ndarray:
        """sim_matrix float32 [A, B] of embedded captions and videos, block by block.

        The token-wise product of a block is what has to fit in memory, whatever A and B are.
        """
        texts, videos = (len(next(iter(arrays.values()))) for arrays in (text, video))
        text_block = self._rows(self._config.eval.text_block, texts)
        video_block = min(self._config.eval.video_block, videos)
        sim_matrix = np.empty((texts, videos), np.float32)
        for columns in _slices(videos, video_block):
            part = {name: _pad_rows(array[columns], video_block) for name, array in video.items()}
            for rows in _slices(texts, text_block):
                own = {name: _pad_rows(array[rows], text_block) for name, array in text.items()}
                block = np.asarray(self._similarity(params, shard_rows(own, self._mesh), part))
                sim_matrix[rows, columns] = block[: texts - rows.start, : videos - columns.start]
        return sim_matrix


def order_by_content(frames: np.ndarray) -> np.ndarray:
    """Frames in an order that does not depend on time: a clip and its reverse become the same."""
    return np.stack(sorted(frames, key=lambda frame: frame.tobytes()))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    """Repeats the last row until there are `rows`; a real row keeps every softmax finite."""
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), axis=0)])
