"""The backbone of a model whose features an extractor of one's own makes."""

import jax
import jax.numpy as jnp
from flax import nnx

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.clip import CLIP
from drl_jax.models.extractors import EXTRACTORS
from drl_jax.models.towers import INITIAL_LOGIT_BIAS, TextFeatures


class ExtractedBackbone(nnx.Module):
    """What a model has in place of towers: the temperature, and features as they are."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        del rngs
        self.logit_scale = nnx.Param(jnp.asarray(CLIP.INITIAL_LOGIT_SCALE, jnp.float32))
        if model.backbone.logit_bias:
            self.logit_bias = nnx.Param(jnp.asarray(INITIAL_LOGIT_BIAS, jnp.float32))

    @classmethod
    def config_error(cls, config: BackboneConfig) -> str:
        """Why the features do not go with a configuration; empty if they do."""
        made = EXTRACTORS[config.family]
        for field, value in (("embed_dim", made.CHANNELS), ("image_resolution", made.IMAGE_SIZE)):
            if getattr(config, field) != value:
                return f"{field} must be {value}, as the features of {config.family} are"
        return ""

    def encode_image(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        raise NotImplementedError("the extractor makes features outside of compiled functions")

    encode_text = encode_image


def as_text_features(features: jax.Array) -> TextFeatures:
    """[B, 1 + L, D], of the sentence and then of each token, as what a text tower returns."""
    features = features.astype(jnp.float32)
    return TextFeatures(features[:, 1:], features[:, 0])
