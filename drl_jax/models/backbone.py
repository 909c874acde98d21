"""The interface of a backbone: a pair of an image and a text tower.

A new family is a subclass in a module of its own and an entry of `drl.BACKBONES`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from flax import nnx

from drl_jax.config import BackboneConfig, ModelConfig


class TemporalInit(NamedTuple):
    """What heads with a transformer start from ("Initialization trick" of the reference).

    Attributes:
      positions: position embeddings [T, D].
      blocks: stacked parameters of residual attention blocks, layers first.
    """

    positions: jax.Array
    blocks: Any


class Backbone(nnx.Module):
    """Tokenises captions, normalises pixels, and encodes images and texts."""

    # Tokens of the tokenizer; the text tower has at least as many.
    VOCABULARY_SIZE: ClassVar[int]
    # float32 scalar parameter, the logarithm of the temperature's inverse.
    logit_scale: nnx.Param

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    @staticmethod
    def config_error(config: BackboneConfig) -> str:
        """Why the towers cannot be built from a configuration; empty if they can."""
        raise NotImplementedError

    @staticmethod
    def tokenize(captions: Sequence[str], max_words: int) -> tuple[np.ndarray, np.ndarray]:
        """N captions -> text_ids int32 [N, L], text_mask bool [N, L]; L = max_words."""
        raise NotImplementedError

    @staticmethod
    def token_strings(text_ids: np.ndarray) -> list[str]:
        """The text of each token id of a caption, int [L]."""
        raise NotImplementedError

    @staticmethod
    def normalize(frames: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """uint8 [B, F, H, W, 3], bool [B, F] -> float32 of the same shape; padded frames are 0."""
        raise NotImplementedError

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Normalised images float32 [B, H, W, 3] -> features float32 [B, D]."""
        raise NotImplementedError

    def encode_text(self, text_ids: jax.Array) -> jax.Array:
        """int32 [B, L] -> a feature for every position, float32 [B, L, D]."""
        raise NotImplementedError

    @staticmethod
    def temporal_init(params: Mapping[str, Any]) -> TemporalInit:
        """What the temporal head and xti start from, given the parameters of the towers."""
        raise NotImplementedError
