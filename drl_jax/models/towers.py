"""What the backbones of all families share: an image tower beside a text transformer.

A new family is a subclass of `Backbone` in a module of its own and an entry of `drl.BACKBONES`.
Shapes: B rows, N patches, L tokens, W channels of a tower, D channels of the features.
"""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, variance_scaling

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.attention import AttentionMask
from drl_jax.models.layers import (
    BlockConfig,
    Transformer,
    clip_block_init,
    layer_norm,
    rematerialized,
)
from drl_jax.models.linear import Linear

# Of SigLIP's loss, before training.
INITIAL_LOGIT_BIAS = -10.0


class TextFeatures(NamedTuple):
    """What a text tower makes of captions.

    Attributes:
      tokens: float32 [B, L, D], of every position; those of padding mean nothing.
      sentence: float32 [B, D], of the whole caption.
    """

    tokens: jax.Array
    sentence: jax.Array


class ImageTower(nnx.Module):
    """Normalisation of pixels, patch embedding, positions and transformer; subclasses pool.

    With a class token (CLIP, PE), `ln_pre` follows the embedding. Without (SigLIP), it has a bias.
    """

    def __init__(self, model: ModelConfig, *, class_token: bool, rngs: nnx.Rngs):
        config = model.backbone
        width, patch, eps = config.vision_width, config.vision_patch_size, config.layer_norm_eps
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
        deviation = model.position_std or scale
        self.positional_embedding = nnx.Param(deviation * rngs.params.normal((positions, width)))
        self.ln_pre = layer_norm(width, eps, rngs=rngs) if class_token else None
        layers = config.vision_layers
        self.transformer = Transformer(
            BlockConfig.of_tower(config, "vision"),
            layers,
            init=clip_block_init(width, layers),
            run=model,
            lora=model.lora,
            rngs=rngs,
        )
        self.ln_post = layer_norm(width, eps, rngs=rngs)

    def __call__(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3], bool [B] -> features float32 [B, D]."""
        rows, height, width, _ = images.shape
        patch = self.patch_size
        # A convolution leaves out the pixels that fill no patch.
        images = images[:, : height // patch * patch, : width // patch * patch]
        # [B, H, W, 3] -> [B, N, p*p, 3]. Transposes bytes, a fourth of the size of floats.
        x = images.reshape(rows, height // patch, patch, width // patch, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, patch * patch, 3)
        # The backward pass normalises again: it keeps the bytes.
        return self.pool(rematerialized(self.embed_patches, self.remat)(x, mask))

    def embed_patches(self, patches: jax.Array, mask: jax.Array) -> jax.Array:
        """uint8 [B, N, p*p, 3], bool [B] -> input of the transformer, float32 [B, N (+1), W]."""
        mean, std = np.asarray(self.pixel_mean, np.float32), np.asarray(self.pixel_std, np.float32)
        pixels = (patches.astype(jnp.float32) / 255.0 - mean) / std
        return self.embed_pixels(pixels * mask[:, None, None, None])

    def embed_pixels(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels of patches, float32 [B, N, p*p, 3] -> float32 [B, N (+1), W]."""
        x = self.conv1(pixels.reshape(*pixels.shape[:2], -1))  # [B, N, p*p*3] -> [B, N, W]
        if self.class_embedding is None:
            return x + self.positional_embedding[...]
        cls = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positional_embedding[...]
        return self.ln_pre(x)

    def pool(self, x: jax.Array) -> jax.Array:
        """Runs the transformer and pools: float32 [B, N (+1), W] -> features float32 [B, D]."""
        raise NotImplementedError


class Backbone(nnx.Module):
    """An image tower beside a text transformer, whose parameters are at the top, as OpenAI's are.

    A family sets the class attributes, adds `text_projection`, and defines `encode_text`.
    `logit_scale` is the logarithm of the temperature's inverse; `logit_bias`, which exists if the
    configuration says so, is added to the logits of the sigmoid loss. Both are float32 scalars.
    """

    # An ImageTower that takes a model and `rngs`.
    IMAGE_TOWER: ClassVar[type[nnx.Module]]
    INITIAL_LOGIT_SCALE: ClassVar[float]

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        config = model.backbone
        width, layers = config.text_width, config.text_layers
        self.visual = self.IMAGE_TOWER(model, rngs=rngs)
        self.token_embedding = nnx.Embed(
            config.vocab_size, width, embedding_init=normal(0.02), rngs=rngs
        )
        positions = 0.01 * rngs.params.normal((config.context_length, width))
        self.positional_embedding = nnx.Param(positions)
        self.transformer = Transformer(
            BlockConfig.of_tower(config, "text"),
            layers,
            init=clip_block_init(width, layers),
            run=model,
            lora=model.lora,
            rngs=rngs,
        )
        self.ln_final = layer_norm(width, config.layer_norm_eps, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(self.INITIAL_LOGIT_SCALE, jnp.float32))
        if config.logit_bias:
            self.logit_bias = nnx.Param(jnp.asarray(INITIAL_LOGIT_BIAS, jnp.float32))

    @classmethod
    def config_error(cls, config: BackboneConfig) -> str:
        """Why the towers cannot be built from a configuration; empty if they can."""
        if config.image_resolution < config.vision_patch_size:
            return "image_resolution must be at least model.backbone.vision_patch_size"
        for tower in ("vision", "text"):
            if getattr(config, f"{tower}_width") % getattr(config, f"{tower}_heads"):
                return f"{tower}_width must be a multiple of model.backbone.{tower}_heads"
        return ""

    def encode_image(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        """RGB images, uint8 [B, H, W, 3], bool [B] -> features float32 [B, D].

        Masked images are 0 *after* normalisation, as the reference's padded frames.
        """
        return self.visual(images, mask)

    def encode_text(self, text_ids: jax.Array, text_mask: jax.Array) -> TextFeatures:
        """int32 [B, L], bool [B, L] -> features of every position and of the caption."""
        raise NotImplementedError

    def run_text(self, text_ids: jax.Array, mask: AttentionMask) -> jax.Array:
        """int32 [B, L] -> normalised output of the text transformer, float32 [B, L, W]."""
        x = self.token_embedding(text_ids) + self.positional_embedding[: text_ids.shape[1]]
        return self.ln_final(self.transformer(x, mask))
