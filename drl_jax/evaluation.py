"""Retrieval evaluation: every caption and every video is embedded once, then compared in blocks."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from drl_jax.config import Config, ConfigError
from drl_jax.data.frames import pad_frames
from drl_jax.data.records import Split, VideoDataset
from drl_jax.distributed import is_main
from drl_jax.metrics import pair_accuracy, retrieval_metrics
from drl_jax.models.drl import Params
from drl_jax.sharding import Layout
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

    def __init__(self, config: Config, dataset: VideoDataset, layout: Layout):
        if config.model.clip.vocab_size < VOCABULARY_SIZE:
            raise ConfigError(
                f"config.model.clip.vocab_size={config.model.clip.vocab_size} is too small for"
                f" CLIP's tokeniser, which has {VOCABULARY_SIZE} tokens"
            )
        self._config, self._dataset, self._layout = config, dataset, layout
        self._encode_text, self._encode_frames, self._similarity = make_embed_steps(
            config.model, layout
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

        def read(rows: np.ndarray) -> Features:
            return {"text_ids": text_ids[rows], "text_mask": text_mask[rows]}

        return self._embed(params, self._encode_text, read, len(captions), "captions")

    def embed_videos(
        self, params: Params, videos: np.ndarray, *, frame_order: FrameOrder | None = None
    ) -> Features:
        """Positions of N stored videos -> the arrays of `DRL.encode_frames`, on the host."""

        def read_one(video: int) -> tuple[np.ndarray, np.ndarray]:
            frames = self._dataset.read_frames(video)
            if frame_order is not None:
                frames = frame_order(frames)
            return pad_frames(frames, self._config.data.max_frames)

        def read(rows: np.ndarray) -> Features:
            frames, masks = zip(*pool.map(read_one, videos[rows]), strict=True)
            return {"frames": np.stack(frames), "frame_mask": np.stack(masks)}

        with ThreadPoolExecutor(self._config.data.num_threads) as pool:
            return self._embed(params, self._encode_frames, read, len(videos), "videos")

    def _rows(self, wanted: int, available: int | None = None) -> int:
        """Rows of a batch: those wanted or available, rounded up to what the devices divide."""
        rows = wanted if available is None else min(wanted, available)
        devices = self._layout.devices
        return -(-rows // devices) * devices

    def _embed(
        self,
        params: Params,
        encode: Callable[..., dict[str, jax.Array]],
        read: Callable[[np.ndarray], Features],
        count: int,
        unit: str,
    ) -> Features:
        parts, size = [], self._rows(self._config.eval.batch_size, count)
        own = self._layout.local_rows(size)
        with self._progress(count, unit) as progress:
            for start in range(0, count, size):
                # One shape, one compilation: the last batch repeats the last row.
                rows = np.minimum(np.arange(start, start + size), count - 1)
                feat = encode(params, *self._layout.put_rows(read(rows[own])).values())
                valid = min(size, count - start)
                parts.append({name: np.asarray(array)[:valid] for name, array in feat.items()})
                progress.update(valid)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _progress(self, count: int, unit: str) -> tqdm:
        hidden = True if not is_main() else None  # None: shown on a terminal
        return tqdm(
            total=count, desc=f"embedding {unit}", unit=unit[:-1], leave=False, disable=hidden
        )

    def similarity(self, params: Params, text: Features, video: Features) -> np.ndarray:
        """sim_matrix float32 [A, B] of embedded captions and videos, captions in blocks.

        Captions go in blocks of `eval.text_block`, videos in blocks of `model.similarity_block`:
        the token-wise product of two blocks is what has to fit in memory, whatever A and B are.
        """
        texts, videos = (len(next(iter(arrays.values()))) for arrays in (text, video))
        size = self._rows(self._config.eval.text_block, texts)
        video = jax.device_put(video, self._layout.whole)
        sim_matrix = np.empty((texts, videos), np.float32)
        own = self._layout.local_rows(size)
        for start in range(0, texts, size):
            rows = np.minimum(np.arange(start, start + size), texts - 1)
            part = {name: array[rows[own]] for name, array in text.items()}
            block = self._similarity(params, self._layout.put_rows(part), video)
            valid = min(size, texts - start)
            sim_matrix[start : start + valid] = np.asarray(block)[:valid]
        return sim_matrix


def order_by_content(frames: np.ndarray) -> np.ndarray:
    """Frames in an order that does not depend on time: a clip and its reverse become the same."""
    return np.stack(sorted(frames, key=lambda frame: frame.tobytes()))
