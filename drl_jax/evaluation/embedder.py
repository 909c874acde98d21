"""Encodes captions and videos into the arrays that an interaction compares, and compares them.

Used by evaluation and search. Everything is encoded once, in batches of one shape.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from drl_jax.config import Config, ModelConfig
from drl_jax.data.pictures import pad_frames
from drl_jax.models.drl import Params, abstract_params, model_definition
from drl_jax.models.extractors import EXTRACTORS, frame_features
from drl_jax.models.interactions import Features
from drl_jax.models.tokenizers import load_tokenizer
from drl_jax.models.tokenizers.base import Tokenized
from drl_jax.runtime.distributed import is_main
from drl_jax.runtime.sharding import Layout

# Positions that a text tower reads at least.
_LEAST_POSITIONS = 32

# uint8 [N, S, S, 3] -> features of the image tower, float32 [N, D].
EncodeImages = Callable[[np.ndarray], np.ndarray]


class Embedder:
    """The encoders and the similarity of a model, compiled once.

    Parameters are passed to each call, so that training can evaluate its current ones.
    """

    def __init__(self, config: Config, layout: Layout, *, keep_tokens: bool = False):
        """Functions are compiled at their first call; raises the errors of `load_tokenizer`."""
        self.tokenizer = load_tokenizer(config.model)
        self._config, self._layout = config, layout
        family = config.model.backbone.family
        self._own_images: EncodeImages | None = None
        if family in EXTRACTORS:
            self._own_images = functools.partial(frame_features, family)
        self._encode_images: EncodeImages | None = self._own_images
        self._steps = make_embed_steps(config.model, layout, keep_tokens=keep_tokens)

    def with_images_by(self, encode_images: EncodeImages | None) -> "Embedder":
        """The same, whose image tower another function computes; None: it itself."""
        other = copy.copy(self)
        other._encode_images = encode_images or self._own_images
        return other

    def tokenize(self, captions: Sequence[str]) -> Tokenized:
        """The ids of captions, at most `data.max_words` each."""
        return self.tokenizer.tokenize(captions, self._config.data.max_words)

    def encode_text(self, params: Params, tokens: Tokenized) -> Features:
        """The tokens of N captions -> the arrays of `DRL.encode_text`.

        The tower reads as many positions as the longest caption needs, in a few sizes: the feature
        of a token does not depend on the padding after it, and interactions multiply that of the
        padding by 0.
        """
        return self._encode_texts(params, self._steps.encode_text, tokens)

    def encode_text_features(self, params: Params, tokens: Tokenized) -> list[np.ndarray]:
        """The tokens of N captions -> the features of each sentence and its tokens, [1 + L, D]."""
        if tokens.text_ids.ndim == 3:
            found = tokens.text_ids
        else:
            text = self._encode_texts(params, self._steps.encode_tokens, tokens)
            found = np.concatenate([text["sentence"][:, None], text["text_feat"]], axis=1)
        lengths = tokens.text_mask.sum(axis=1)
        return [row[: 1 + length] for row, length in zip(found, lengths, strict=True)]

    def _encode_texts(
        self, params: Params, encode: Callable[..., dict[str, jax.Array]], tokens: Tokenized
    ) -> Features:
        text_ids, text_mask, _ = tokens
        longest = int(text_mask.sum(axis=1).max())
        positions = max(_LEAST_POSITIONS, 1 << (longest - 1).bit_length())
        added = max(0, text_mask.shape[1] - positions)
        # Stored features have that of the sentence before those of its tokens.
        width = min(positions, text_mask.shape[1]) + text_ids.ndim - 2

        def read(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            return text_ids[rows, :width], text_mask[rows, :positions]

        text = self._encode(params, encode, read, len(text_ids), "caption")
        for name in [name for name in text if added and name.startswith("text_")]:
            rest = [(0, 0)] * (text[name].ndim - 2)
            text[name] = np.pad(text[name], [(0, 0), (0, added), *rest])
        return text

    def encode_video(
        self, params: Params, read: Callable[[np.ndarray], list[np.ndarray]], count: int
    ) -> Features:
        """N = `count` videos -> the arrays of `DRL.encode_video`.

        `read` maps indices of videos, int [B], to the frames of each, uint8 [F, H, W, 3].
        """

        def read_padded(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            padded = [pad_frames(frames, self._config.data.max_frames) for frames in read(rows)]
            return tuple(map(np.stack, zip(*padded, strict=True)))

        if self._encode_images is not None:
            return self._encode_single_frames(params, read, count)
        return self._encode(params, self._steps.encode_video, read_padded, count, "video")

    def _encode_single_frames(
        self, params: Params, read: Callable[[np.ndarray], list[np.ndarray]], count: int
    ) -> Features:
        """As `encode_video`, but that padding has no features before the temporal head."""
        features, windows, first = [], [], 0
        size = self._config.eval.batch_size
        for start in range(0, count, size):
            videos = read(np.arange(start, min(start + size, count)))
            features.append(self.encode_frames(params, np.concatenate(videos)))
            for frames in videos:
                windows.append(range(first, first + len(frames)))
                first += len(frames)
        return self.encode_windows(params, np.concatenate(features), windows)

    def encode_frames(self, params: Params, frames: np.ndarray) -> np.ndarray:
        """Frames uint8 [F, H, W, 3], maybe of a memory map -> features of the image tower [F, D].

        The features, float32, are those before the temporal head.
        """
        if self._encode_images is not None:
            return self._encode_images(frames)

        def read(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            return frames[rows], np.ones(len(rows), bool)

        encoded = self._encode(params, self._steps.encode_image, read, len(frames), "frame")
        return encoded["image_feat"]

    def encode_windows(
        self, params: Params, image_feat: np.ndarray, windows: Sequence[Sequence[int]]
    ) -> Features:
        """Windows of frames -> the arrays of `DRL.encode_video`.

        `image_feat` float32 [F, D] is of `encode_frames`; `windows` are the frames of each of N
        windows, at most `data.max_frames`.
        """
        most = self._config.data.max_frames

        def read(rows: np.ndarray) -> tuple[np.ndarray, ...]:
            feat = np.zeros((len(rows), most, image_feat.shape[-1]), np.float32)
            mask = np.zeros((len(rows), most), bool)
            for row, window in enumerate(windows[number] for number in rows):
                feat[row, : len(window)] = image_feat[list(window)]
                mask[row, : len(window)] = True
            return feat, mask

        return self._encode(params, self._steps.encode_window, read, len(windows), "window")

    def similarity(self, params: Params, text: Features, video: Features) -> np.ndarray:
        """sim_matrix float32 [A, B] of encoded captions and videos.

        Compares `eval.text_block` captions with `model.similarity_block` videos at a time: the
        token-wise product of two blocks has to fit in memory, for any A and B.
        """
        texts, videos = (len(next(iter(arrays.values()))) for arrays in (text, video))
        size = self._batch_rows(self._config.eval.text_block, _rounded(texts))
        rows = np.minimum(np.arange(_rounded(videos)), videos - 1)
        video = {name: array[rows] for name, array in video.items()}
        video = jax.device_put(video, self._layout.replicated)
        sim_matrix = np.empty((texts, videos), np.float32)
        own = self._layout.local_rows(size)
        for start in range(0, texts, size):
            rows = np.minimum(np.arange(start, start + size), texts - 1)
            part = {name: array[rows[own]] for name, array in text.items()}
            block = self._steps.similarity(params, self._layout.put_batch(part), video)
            valid = min(size, texts - start)
            sim_matrix[start : start + valid] = np.asarray(block)[:valid, :videos]
        return sim_matrix

    def _batch_rows(self, wanted: int, available: int) -> int:
        """Rows of a batch: at most `wanted`, rounded up to a multiple of the device count."""
        devices = self._layout.device_count
        return -(-min(wanted, available) // devices) * devices

    def _encode(
        self,
        params: Params,
        encode: Callable[..., dict[str, jax.Array]],
        read: Callable[[np.ndarray], tuple[np.ndarray, ...]],
        count: int,
        unit: str,
    ) -> Features:
        parts, size = [], self._batch_rows(self._config.eval.batch_size, _rounded(count))
        own = self._layout.local_rows(size)
        # None: shown on a terminal only.
        shown = {"unit": unit, "leave": False, "disable": None if is_main() else True}
        with tqdm(total=count, desc=f"encoding {unit}s", **shown) as progress:
            for start in range(0, count, size):
                # The last batch repeats the last row: one shape, one compilation.
                rows = np.minimum(np.arange(start, start + size), count - 1)
                batch = dict(zip(("input", "mask"), read(rows[own]), strict=True))
                feat = encode(params, *self._layout.put_batch(batch).values())
                valid = min(size, count - start)
                parts.append({name: np.asarray(array)[:valid] for name, array in feat.items()})
                progress.update(valid)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _rounded(count: int) -> int:
    """Up to a power of two, or a multiple of 1,024: few shapes, and few programs to compile."""
    return min(1 << (count - 1).bit_length(), -(-count // 1024) * 1024)


class EmbedSteps(NamedTuple):
    """Compiled functions of parameters and arrays; the encoders return arrays by name."""

    encode_text: Callable  # text_ids, text_mask -> as `DRL.encode_text`
    encode_tokens: Callable  # the same -> `text_feat` [B, L, D] and `sentence` [B, D] of the tower
    encode_video: Callable  # frames, frame_mask -> as `DRL.encode_video`
    encode_image: Callable  # images uint8 [B, H, W, 3], mask bool [B] -> `image_feat` [B, D]
    encode_window: Callable  # image_feat [B, F, D], mask bool [B, F] -> as `encode_video`
    similarity: Callable  # arrays of texts and of videos -> [A, B]


def make_embed_steps(
    model: ModelConfig, layout: Layout, *, keep_tokens: bool = False
) -> EmbedSteps:
    """Compiles the functions of evaluation and search.

    Inputs are batch-sharded; the videos of `similarity` and results are replicated. With
    `keep_tokens`, for search, encoders also return features and masks of tokens and frames that the
    interaction does not need (`text_feat`, `frame_feat`).
    """
    definition = model_definition(model)
    replicated, sharded = layout.replicated, layout.batch_sharded
    # With fsdp, parameters stay split between calls.
    params = layout.parameters(abstract_params(model, layout))

    def encode_text(params, text_ids, text_mask):
        model = nnx.merge(definition, params)
        feat = model.text_features(text_ids, text_mask)
        text = model.interaction.encode_text(feat, text_mask)
        return with_tokens(text, "text", feat.tokens, text_mask)

    def encode_tokens(params, text_ids, text_mask):
        feat = nnx.merge(definition, params).text_features(text_ids, text_mask)
        return {"text_feat": feat.tokens, "sentence": feat.sentence}

    def encode_video(params, frames, frame_mask):
        model = nnx.merge(definition, params)
        return of_frames(model, model.frame_features(frames, frame_mask), frame_mask)

    def encode_image(params, images, mask):
        return {"image_feat": nnx.merge(definition, params).backbone.encode_image(images, mask)}

    def encode_window(params, image_feat, frame_mask):
        model = nnx.merge(definition, params)
        return of_frames(model, model.aggregate(image_feat, frame_mask), frame_mask)

    def of_frames(model, feat, frame_mask):
        video = model.interaction.encode_video(feat, frame_mask)
        return with_tokens(video, "frame", feat, frame_mask)

    def with_tokens(arrays, name, feat, mask):
        if not keep_tokens:
            return arrays
        tokens = {} if f"{name}_unit" in arrays else {f"{name}_feat": feat}
        return {**tokens, f"{name}_mask": mask, **arrays}

    def similarity(params, text, video):
        return nnx.merge(definition, params).similarity(text, video)

    def compiled(function, *shardings):
        return jax.jit(
            layout.on_mesh(function, model.dtype),
            in_shardings=(params, *shardings),
            out_shardings=replicated,
        )

    pair = (sharded, sharded)
    encoders = (encode_text, encode_tokens, encode_video, encode_image, encode_window)
    steps = {function.__name__: compiled(function, *pair) for function in encoders}
    return EmbedSteps(**steps, similarity=compiled(similarity, sharded, replicated))
