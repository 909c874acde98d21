"""SigLIP and SigLIP 2 of a fixed resolution. The arithmetic is that of big_vision and Hugging Face.

Names are CLIP's where a part is CLIP's: `conv1`, `ln_final`, `text_projection` (Hugging Face's
`text_model.head`) and `attn_pool` (`vision_model.head`).
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.attention import NO_MASK
from drl_jax.models.layers import AttentionPool, BlockConfig, clip_block_init
from drl_jax.models.towers import Backbone, ImageTower, TextFeatures


class SigLIPImageTower(ImageTower):
    """The feature is pooled from all patches; it is not projected."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(model, class_token=False, rngs=rngs)
        config = model.backbone
        self.attn_pool = AttentionPool(
            BlockConfig.of_tower(config, "vision"),
            clip_block_init(config.vision_width, config.vision_layers),
            model,
            rngs=rngs,
        )

    def pool(self, x: jax.Array) -> jax.Array:
        return self.attn_pool(self.ln_post(self.transformer(x))).astype(jnp.float32)


class SigLIP(Backbone):
    """SigLIP; the text tower attends in both directions."""

    IMAGE_TOWER: ClassVar = SigLIPImageTower
    INITIAL_LOGIT_SCALE: ClassVar = np.log(10)

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(model, rngs=rngs)
        config = model.backbone
        self.pad_id = config.pad_id
        self.text_projection = nnx.Linear(config.text_width, config.embed_dim, rngs=rngs)

    @classmethod
    def config_error(cls, config: BackboneConfig) -> str:
        if error := super().config_error(config):
            return error
        if config.embed_dim != config.vision_width:
            return "embed_dim must equal model.backbone.vision_width: siglip projects no images"
        return ""

    def encode_text(self, text_ids: jax.Array, text_mask: jax.Array) -> TextFeatures:
        """The tower attends to padding, and was trained with captions padded to all its positions.

        The feature of the sentence is that of the last position.
        """
        length, positions = text_ids.shape[1], len(self.positional_embedding[...])
        text_ids = jnp.where(text_mask, text_ids, self.pad_id)
        padding = jnp.full((text_ids.shape[0], positions - length), self.pad_id, text_ids.dtype)
        text_ids = jnp.concatenate([text_ids, padding], axis=1)
        features = self.text_projection(self.run_text(text_ids, NO_MASK))
        return TextFeatures(features[:, :length], features[:, -1])
