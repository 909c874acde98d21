"""CLIP's image and text tower. Names and arithmetic are OpenAI's (`clip/model.py`).

The text tower returns a feature for every token; OpenAI's returns that of the last one. Releases of
open_clip have other activations and widths (`BackboneConfig`).
"""

from typing import ClassVar

import jax
import numpy as np
from flax import nnx

from drl_jax.config import ModelConfig
from drl_jax.models.attention import AttentionMask
from drl_jax.models.ops import at_last_token
from drl_jax.models.towers import Backbone, ImageTower, TextFeatures


class CLIPImageTower(ImageTower):
    """The feature is that of the class token."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(model, class_token=True, rngs=rngs)
        width = model.backbone.vision_width
        self.proj = nnx.Param(width**-0.5 * rngs.params.normal((width, model.backbone.embed_dim)))

    def pool(self, x: jax.Array) -> jax.Array:
        x = self.transformer(x, queries=1)  # of the class token
        return self.ln_post(x[:, 0]) @ self.proj[...]


class CLIP(Backbone):
    """CLIP with a vision transformer."""

    IMAGE_TOWER: ClassVar = CLIPImageTower
    INITIAL_LOGIT_SCALE: ClassVar = np.log(1 / 0.07)

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(model, rngs=rngs)
        width, features = model.backbone.text_width, model.backbone.embed_dim
        self.text_projection = nnx.Param(width**-0.5 * rngs.params.normal((width, features)))

    def encode_text(self, text_ids: jax.Array, text_mask: jax.Array) -> TextFeatures:
        """Attention is causal, so no token of a caption sees the padding after it.

        The tower therefore needs no padding mask; interactions mask the padding's features.
        """
        tokens = self.run_text(text_ids, AttentionMask(causal=True)) @ self.text_projection[...]
        return TextFeatures(tokens, at_last_token(tokens, text_mask))
