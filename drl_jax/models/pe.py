"""Perception Encoder (PE-Core). Names and arithmetic are those of facebookresearch's code.

The text tower is CLIP's. The image tower has a rotary position embedding beside the learned one,
and pools all its positions.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.attention import grid_rotation
from drl_jax.models.clip import CLIP
from drl_jax.models.layers import AttentionPool, BlockConfig, clip_block_init
from drl_jax.models.towers import ImageTower

# Of the pooling, in every size.
_POOL_HEADS = 8


class PEImageTower(ImageTower):
    """The feature is pooled from the class token and all patches."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(model, class_token=True, rngs=rngs)
        config = model.backbone
        width = config.vision_width
        self.grid = config.image_resolution // config.vision_patch_size
        self.head_width = width // config.vision_heads
        self.attn_pool = AttentionPool(
            BlockConfig.of_tower(config, "vision")._replace(heads=_POOL_HEADS),
            clip_block_init(width, config.vision_layers),
            model,
            rngs=rngs,
        )
        self.proj = nnx.Param(width**-0.5 * rngs.params.normal((width, config.embed_dim)))

    def pool(self, x: jax.Array) -> jax.Array:
        rotation = grid_rotation(self.grid, self.head_width)
        x = self.ln_post(self.transformer(x, rotation=rotation))
        return self.attn_pool(x).astype(jnp.float32) @ self.proj[...]


class PerceptionEncoder(CLIP):
    """PE-Core of the sizes that have a class token (T, S, B and L)."""

    IMAGE_TOWER: ClassVar = PEImageTower

    @classmethod
    def config_error(cls, config: BackboneConfig) -> str:
        if error := super().config_error(config):
            return error
        if config.vision_width % _POOL_HEADS:
            return f"vision_width must be a multiple of the {_POOL_HEADS} heads of pe's pooling"
        if config.vision_width // config.vision_heads % 4:
            return "vision_width / vision_heads must be a multiple of 4 for pe's rotary embedding"
        return ""
