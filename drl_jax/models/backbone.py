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
    """Tokenises captions, and encodes images and texts."""

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

    def encode_image(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          images: RGB, uint8 [B, H, W, 3].
          mask: bool [B]; where it is False, all pixels are 0 *after* normalisation, as those of the
            reference's padded frames.

        Returns:
          Features, float32 [B, D].
        """
        raise NotImplementedError

    def encode_text(self, text_ids: jax.Array) -> jax.Array:
        """int32 [B, L] -> a feature for every position, float32 [B, L, D]."""
        raise NotImplementedError

    @staticmethod
    def temporal_init(params: Mapping[str, Any]) -> TemporalInit:
        """What the temporal head and xti start from, given the parameters of the towers."""
        raise NotImplementedError
