"""The parts that the towers of all families share."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, variance_scaling

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.attention import AttentionMask
from drl_jax.models.backbone import Backbone, TemporalInit
from drl_jax.models.layers import (
    BlockConfig,
    BlockRunConfig,
    Transformer,
    clip_block_init,
    layer_norm,
    rematerialized,
)
from drl_jax.models.linear import Linear

# Of SigLIP's loss, before training.
INITIAL_LOGIT_BIAS = -10.0


class ImageTower(nnx.Module):
    """Normalisation of pixels, patch embedding, positions and transformer; subclasses pool.

    With a class token (CLIP, Perception Encoder), `ln_pre` follows the embedding, and patches have
    no bias. Without one (SigLIP), patches have a bias.
    """

    def __init__(self, model: ModelConfig, *, class_token: bool, rngs: nnx.Rngs):
        config = model.backbone
        width, patch = config.vision_width, config.vision_patch_size
        self.patch_size, self.remat = patch, model.remat
        self.pixel_mean, self.pixel_std = config.pixel_mean, config.pixel_std
        positions = (config.image_resolution // patch) ** 2 + class_token
        scale = width**-0.5
        # A convolution whose stride equals its kernel size is a matrix product over patches. OpenAI
        # uses torch's default initialiser of convolutions.
        self.conv1 = Linear(
            patch * patch * 3,
            width,
            use_bias=not class_token,
            kernel_init=variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=jnp.dtype(model.array_dtype),
            rngs=rngs,
        )
        self.class_embedding = (
            nnx.Param(scale * rngs.params.normal((width,))) if class_token else None
        )
        self.positional_embedding = nnx.Param(
            (model.position_std or scale) * rngs.params.normal((positions, width))
        )
        self.ln_pre = layer_norm(width, config.layer_norm_eps, rngs=rngs) if class_token else None
        self.transformer = Transformer(
            BlockConfig.of_image_tower(config),
            config.vision_layers,
            init=clip_block_init(width, config.vision_layers),
            run=BlockRunConfig.of(model),
            rngs=rngs,
        )
        self.ln_post = layer_norm(width, config.layer_norm_eps, rngs=rngs)

    def __call__(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3], bool [B] -> features float32 [B, D]."""
        rows, height, width, _ = images.shape
        patch = self.patch_size
        # Transposes bytes, a fourth of the size of normalised pixels.
        x = images.reshape(rows, height // patch, patch, width // patch, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, patch * patch, 3)
        # The backward pass normalises again: it keeps the bytes.
        return self.pool(rematerialized(self.embed_patches, self.remat)(x, mask))

    def embed_patches(self, patches: jax.Array, mask: jax.Array) -> jax.Array:
        """uint8 [B, N, p*p, 3], bool [B] -> input of the transformer, float32 [B, N (+1), D]."""
        mean, std = np.asarray(self.pixel_mean, np.float32), np.asarray(self.pixel_std, np.float32)
        pixels = (patches.astype(jnp.float32) / 255.0 - mean) / std
        return self.embed_pixels(pixels * mask[:, None, None, None])

    def embed_pixels(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels of patches, float32 [B, N, p*p, 3] -> float32 [B, N (+1), D]."""
        x = self.conv1(pixels.reshape(*pixels.shape[:2], -1))
        if self.class_embedding is None:
            return x + self.positional_embedding[...]
        cls = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positional_embedding[...]
        return self.ln_pre(x)

    def pool(self, x: jax.Array) -> jax.Array:
        """Runs the transformer and pools: float32 [B, T, W] -> features float32 [B, D]."""
        raise NotImplementedError


class TransformerBackbone(Backbone):
    """An image tower beside a text transformer, whose parameters are at the top, as OpenAI's are.

    A family sets the class attributes and defines `encode_text`.
    """

    # An ImageTower that takes a model and `rngs`.
    IMAGE_TOWER: ClassVar[type[nnx.Module]]
    INITIAL_LOGIT_SCALE: ClassVar[float]

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        config = model.backbone
        width = config.text_width
        self.visual = self.IMAGE_TOWER(model, rngs=rngs)
        self.token_embedding = nnx.Embed(
            config.vocab_size, width, embedding_init=normal(0.02), rngs=rngs
        )
        self.positional_embedding = nnx.Param(
            0.01 * rngs.params.normal((config.context_length, width))
        )
        self.transformer = Transformer(
            BlockConfig.of_text_tower(config),
            config.text_layers,
            init=clip_block_init(width, config.text_layers),
            run=BlockRunConfig.of(model),
            rngs=rngs,
        )
        self.ln_final = layer_norm(width, config.layer_norm_eps, rngs=rngs)
        self.text_projection = self.new_text_projection(config, rngs)
        self.logit_scale = nnx.Param(jnp.asarray(self.INITIAL_LOGIT_SCALE, jnp.float32))
        if config.logit_bias:
            self.logit_bias = nnx.Param(jnp.asarray(INITIAL_LOGIT_BIAS, jnp.float32))

    @staticmethod
    def new_text_projection(config: BackboneConfig, rngs: nnx.Rngs) -> nnx.Module | nnx.Param:
        """New parameters of the map from the text tower's width to the features."""
        raise NotImplementedError

    @classmethod
    def config_error(cls, config: BackboneConfig) -> str:
        if config.image_resolution % config.vision_patch_size:
            return "image_resolution must be a multiple of model.backbone.vision_patch_size"
        for tower in ("vision", "text"):
            if getattr(config, f"{tower}_width") % getattr(config, f"{tower}_heads"):
                return f"{tower}_width must be a multiple of model.backbone.{tower}_heads"
        return ""

    def encode_image(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        return self.visual(images, mask)

    def run_text(self, text_ids: jax.Array, mask: AttentionMask) -> jax.Array:
        """int32 [B, T] -> normalised output of the text transformer, float32 [B, T, W]."""
        x = self.token_embedding(text_ids) + self.positional_embedding[: text_ids.shape[1]]
        return self.ln_final(self.transformer(x, mask))

    @staticmethod
    def temporal_init(params: Mapping[str, Any]) -> TemporalInit:
        return TemporalInit(params["positional_embedding"], params["transformer"]["resblocks"])
