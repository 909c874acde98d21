"""The interface of a backbone: a pair of an image and a text tower.

A new family is a subclass in a module of its own and an entry of `drl.BACKBONES`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class TextFeatures(NamedTuple):
    """What a text tower makes of captions.

    Attributes:
      tokens: float32 [B, L, D], of every position; those of padding mean nothing.
      sentence: float32 [B, D], of the whole caption.
    """

    tokens: jax.Array
    sentence: jax.Array


def at_last_token(tokens: jax.Array, text_mask: jax.Array) -> jax.Array:
    """The feature of the last valid token (EOS): [B, L, D], bool [B, L] -> [B, D]."""
    last = jnp.sum(text_mask, axis=1) - 1
    return jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]


class Backbone(nnx.Module):
    """Encodes images and texts."""

    # float32 scalar parameter, the logarithm of the temperature's inverse.
    logit_scale: nnx.Param
    # float32 scalar parameter, added to the logits of the sigmoid loss; exists if
    # `BackboneConfig.logit_bias` is set.
    logit_bias: nnx.Param

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        raise NotImplementedError

    @classmethod
    def config_error(cls, config: BackboneConfig) -> str:
        """Why the towers cannot be built from a configuration; empty if they can."""
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

    def encode_text(self, text_ids: jax.Array, text_mask: jax.Array) -> TextFeatures:
        """int32 [B, L], bool [B, L] -> features of every position and of the caption."""
        raise NotImplementedError

    @staticmethod
    def temporal_init(params: Mapping[str, Any]) -> TemporalInit:
        """What the temporal head and xti start from, given the parameters of the towers."""
        raise NotImplementedError
