"""CLIP's image and text tower. Names and arithmetic are OpenAI's (`clip/model.py`).

The text tower returns a feature for every token; OpenAI's returns that of the last one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, variance_scaling

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models import tokenizer
from drl_jax.models.attention import AttentionMask
from drl_jax.models.backbone import Backbone, TemporalInit
from drl_jax.models.layers import (
    BlockRunConfig,
    Linear,
    Transformer,
    clip_block_init,
    rematerialized,
)

# Mean and standard deviation of CLIP's training pixels, RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
INITIAL_LOGIT_SCALE = np.log(1 / 0.07)
_LN_EPS = 1e-5


class VisionTransformer(nnx.Module):
    """The image tower: normalisation, patch embedding, class token, transformer, projection."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        config = model.backbone
        width, patch = config.vision_width, config.vision_patch_size
        self.patch_size, self.remat = patch, model.remat
        patches = (config.image_resolution // patch) ** 2
        scale = width**-0.5
        # A convolution whose stride equals its kernel size is a matrix product over patches. OpenAI
        # uses torch's default initialiser of convolutions.
        self.conv1 = Linear(
            patch * patch * 3,
            width,
            use_bias=False,
            kernel_init=variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=jnp.dtype(model.dtype),
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(scale * rngs.params.normal((width,)))
        self.positional_embedding = nnx.Param(
            (model.position_std or scale) * rngs.params.normal((patches + 1, width))
        )
        self.ln_pre = nnx.LayerNorm(width, epsilon=_LN_EPS, dtype=jnp.float32, rngs=rngs)
        self.transformer = Transformer(
            width,
            config.vision_layers,
            config.vision_heads,
            eps=_LN_EPS,
            init=clip_block_init(width, config.vision_layers),
            run=BlockRunConfig.of(model),
            rngs=rngs,
        )
        self.ln_post = nnx.LayerNorm(width, epsilon=_LN_EPS, dtype=jnp.float32, rngs=rngs)
        self.proj = nnx.Param(scale * rngs.params.normal((width, config.embed_dim)))

    def __call__(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3], bool [B] -> features float32 [B, D]."""
        rows, height, width, _ = images.shape
        patch = self.patch_size
        # Transposes bytes, a fourth of the size of normalised pixels.
        x = images.reshape(rows, height // patch, patch, width // patch, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, patch * patch, 3)
        # The backward pass normalises again: it keeps the bytes.
        x = rematerialized(self.embed_patches, self.remat)(x, mask)
        x = self.transformer(x, queries=1)  # of the class token
        return self.ln_post(x[:, 0]) @ self.proj[...]

    def embed_patches(self, patches: jax.Array, mask: jax.Array) -> jax.Array:
        """uint8 [B, N-1, p*p, 3], bool [B] -> input of the transformer, float32 [B, N, D]."""
        mean, std = np.asarray(PIXEL_MEAN, np.float32), np.asarray(PIXEL_STD, np.float32)
        pixels = (patches.astype(jnp.float32) / 255.0 - mean) / std
        pixels = pixels * mask[:, None, None, None]
        x = self.conv1(pixels.reshape(*patches.shape[:2], -1))
        cls = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positional_embedding[...]
        return self.ln_pre(x)


class CLIP(Backbone):
    """OpenAI's CLIP with a vision transformer."""

    VOCABULARY_SIZE: ClassVar = tokenizer.VOCABULARY_SIZE

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        config = model.backbone
        width = config.text_width
        self.visual = VisionTransformer(model, rngs=rngs)
        self.token_embedding = nnx.Embed(
            config.vocab_size, width, embedding_init=normal(0.02), rngs=rngs
        )
        self.positional_embedding = nnx.Param(
            0.01 * rngs.params.normal((config.context_length, width))
        )
        self.transformer = Transformer(
            width,
            config.text_layers,
            config.text_heads,
            eps=_LN_EPS,
            init=clip_block_init(width, config.text_layers),
            run=BlockRunConfig.of(model),
            rngs=rngs,
        )
        self.ln_final = nnx.LayerNorm(width, epsilon=_LN_EPS, dtype=jnp.float32, rngs=rngs)
        self.text_projection = nnx.Param(
            width**-0.5 * rngs.params.normal((width, config.embed_dim))
        )
        self.logit_scale = nnx.Param(jnp.asarray(INITIAL_LOGIT_SCALE, jnp.float32))

    @staticmethod
    def config_error(config: BackboneConfig) -> str:
        if config.image_resolution % config.vision_patch_size:
            return "image_resolution must be a multiple of model.backbone.vision_patch_size"
        for tower in ("vision", "text"):
            if getattr(config, f"{tower}_width") % getattr(config, f"{tower}_heads"):
                return f"{tower}_width must be a multiple of model.backbone.{tower}_heads"
        if config.text_width != config.embed_dim:
            return (
                "text_width must equal model.backbone.embed_dim: the heads start as copies of the"
                " text tower's blocks"
            )
        return ""

    @staticmethod
    def tokenize(captions: Sequence[str], max_words: int) -> tuple[np.ndarray, np.ndarray]:
        return tokenizer.tokenize(captions, max_words)

    @staticmethod
    def token_strings(text_ids: np.ndarray) -> list[str]:
        return tokenizer.token_strings(text_ids)

    def encode_image(self, images: jax.Array, mask: jax.Array) -> jax.Array:
        return self.visual(images, mask)

    def encode_text(self, text_ids: jax.Array) -> jax.Array:
        """Attention is causal, so no token of a caption sees the padding after it.

        The tower therefore needs no padding mask; interactions mask the padding's features.
        """
        length = text_ids.shape[1]
        x = self.token_embedding(text_ids) + self.positional_embedding[:length]
        x = self.transformer(x, AttentionMask(causal=True))
        return self.ln_final(x) @ self.text_projection[...]

    @staticmethod
    def temporal_init(params: Mapping[str, Any]) -> TemporalInit:
        return TemporalInit(params["positional_embedding"], params["transformer"]["resblocks"])
