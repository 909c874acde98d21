"""CLIP's two towers. Names and arithmetic are OpenAI's (`clip/model.py`).

The text tower returns a feature for every token, where OpenAI's returns only the last one.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, variance_scaling

from drl_jax.config import ModelConfig
from drl_jax.models.layers import Run, Transformer, causal_mask, clip_block_init

# Mean and standard deviation of CLIP's training pixels, RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
INITIAL_LOGIT_SCALE = np.log(1 / 0.07)
_LN_EPS = 1e-5


def normalize_frames(frames: jax.Array, frame_mask: jax.Array) -> jax.Array:
    """Pixels to the tower's input.

    Args:
      frames: uint8 [B, F, H, W, 3].
      frame_mask: bool [B, F].

    Returns:
      float32 [B, F, H, W, 3]; padded frames are exactly 0 *after* normalisation, as in the
      reference.
    """
    mean, std = np.asarray(PIXEL_MEAN, np.float32), np.asarray(PIXEL_STD, np.float32)
    pixels = (frames.astype(jnp.float32) / 255.0 - mean) / std
    return pixels * frame_mask[:, :, None, None, None]


class VisionTransformer(nnx.Module):
    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        config = model.clip
        width, patch = config.vision_width, config.vision_patch_size
        self.patch_size = patch
        patches = (config.image_resolution // patch) ** 2
        scale = width**-0.5
        # A convolution whose stride is its kernel is a matrix product over patches. The
        # initialiser is torch's for convolutions, which OpenAI left as it was.
        self.conv1 = nnx.Linear(
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
            run=Run.of(model),
            rngs=rngs,
        )
        self.ln_post = nnx.LayerNorm(width, epsilon=_LN_EPS, dtype=jnp.float32, rngs=rngs)
        self.proj = nnx.Param(scale * rngs.params.normal((width, config.embed_dim)))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised images float32 [B, H, W, 3] -> features float32 [B, D]."""
        rows, height, width, _ = images.shape
        patch = self.patch_size
        x = images.reshape(rows, height // patch, patch, width // patch, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, -1, patch * patch * 3)  # [B, N-1, p*p*3]
        x = self.conv1(x)
        cls = jnp.broadcast_to(self.class_embedding[...], (rows, 1, x.shape[-1]))
        x = jnp.concatenate([cls, x], axis=1) + self.positional_embedding[...]  # [B, N, D]
        x = self.transformer(self.ln_pre(x), None)
        return self.ln_post(x[:, 0]) @ self.proj[...]


class CLIP(nnx.Module):
    """Both towers and the temperature."""

    def __init__(self, model: ModelConfig, *, rngs: nnx.Rngs):
        config = model.clip
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
            run=Run.of(model),
            rngs=rngs,
        )
        self.ln_final = nnx.LayerNorm(width, epsilon=_LN_EPS, dtype=jnp.float32, rngs=rngs)
        self.text_projection = nnx.Param(
            width**-0.5 * rngs.params.normal((width, config.embed_dim))
        )
        self.logit_scale = nnx.Param(jnp.asarray(INITIAL_LOGIT_SCALE, jnp.float32))

    def encode_text(self, text_ids: jax.Array) -> jax.Array:
        """Token ids int32 [B, L] -> a feature for every position, float32 [B, L, D].

        Attention is causal, so a padded position never reaches a valid one.
        """
        length = text_ids.shape[1]
        x = self.token_embedding(text_ids) + self.positional_embedding[:length]
        x = self.transformer(x, causal_mask(length))
        return self.ln_final(x) @ self.text_projection[...]
