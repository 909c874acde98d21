"""Captions and videos to the arrays that an interaction compares, and their similarity.

Evaluation and search share it: everything is embedded once, in batches of one shape, and compared
in blocks.
"""

from collections.abc import Callable

import jax
import numpy as np
from tqdm import tqdm

from drl_jax.config import Config, ConfigError
from drl_jax.data.frames import pad_frames
from drl_jax.models.drl import Params
from drl_jax.models.interaction import Features
from drl_jax.models.tokenizer import VOCABULARY_SIZE, tokenize
from drl_jax.runtime.distributed import is_main
from drl_jax.sharding import Layout
from drl_jax.training.train_step import make_embed_steps


class Embedder:
    """A model's encoders and its similarity, compiled once.

    Parameters are given to each call, so that training evaluates its own.
    """

    def __init__(self, config: Config, layout: Layout, *, keep_tokens: bool = False):
        """Compiles nothing yet; for `keep_tokens` see `make_embed_steps`.

        Raises:
          ConfigError: the model has fewer tokens than CLIP's tokeniser.
        """
        if config.model.clip.vocab_size < VOCABULARY_SIZE:
            raise ConfigError(
                f"config.model.clip.vocab_size={config.model.clip.vocab_size} is too small for"
                f" CLIP's tokeniser, which has {VOCABULARY_SIZE} tokens"
            )
        self._config, self._layout = config, layout
        self._encode_text, self._encode_frames, self._similarity = make_embed_steps(
            config.model, layout, keep_tokens=keep_tokens
        )

    def captions(self, params: Params, captions: list[str]) -> Features:
        """N captions -> the arrays of `DRL.encode_text`."""
        text_ids, text_mask = tokenize(captions, self._config.data.max_words)

        def read(rows: np.ndarray) -> Features:
            return {"text_ids": text_ids[rows], "text_mask": text_mask[rows]}

        return self._embed(params, self._encode_text, read, len(captions), "captions")

    def videos(
        self, params: Params, read: Callable[[np.ndarray], list[np.ndarray]], count: int
    ) -> Features:
        """N videos -> the arrays of `DRL.encode_frames`.

        Args:
          params: the model's parameters.
          read: from video numbers, int [B], to the frames of each, uint8 [F, H, W, 3].
          count: N.
        """

        def read_padded(rows: np.ndarray) -> Features:
            padded = [pad_frames(frames, self._config.data.max_frames) for frames in read(rows)]
            frames, masks = zip(*padded, strict=True)
            return {"frames": np.stack(frames), "frame_mask": np.stack(masks)}

        return self._embed(params, self._encode_frames, read_padded, count, "videos")

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
