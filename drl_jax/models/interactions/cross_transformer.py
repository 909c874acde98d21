"""xti: a transformer over the sentence and the frames of each pair."""

import dataclasses
from collections.abc import Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal

from drl_jax.config import ModelConfig
from drl_jax.models.attention import AttentionMask
from drl_jax.models.heads import count_blocks
from drl_jax.models.interactions.base import (
    Arrays,
    Features,
    Interaction,
    frames_as_tokens,
    unit_features,
)
from drl_jax.models.layers import (
    BERT_LN_EPS,
    Transformer,
    layer_norm,
    new_block_config,
    new_block_init,
    quick_gelu,
)
from drl_jax.models.linear import linear_without_bias_gradient
from drl_jax.models.ops import lengths_of
from drl_jax.models.towers import TextFeatures

_HEADS = 8


class CrossTransformer(Interaction):
    """Transformer over [sentence, frames], then a pooler and a linear layer."""

    INHERITS: ClassVar = ("explanation", "pooled")
    HAS_DROPOUT: ClassVar = True
    TEXT_ARRAYS: ClassVar = ("sentence_feat",)
    VIDEO_ARRAYS: ClassVar = ("frame_feat", "frame_mask")
    COPIED_POSITIONS: ClassVar = "position_embeddings"
    REFERENCE_NAMES: ClassVar = (
        (r"^position_embeddings/", "cross/embeddings/position_embeddings/"),
        (r"^transformer/", "cross/transformer/"),
        (r"^(ln_pool|dense)/", r"cross/pooler/\1/"),
        (r"^similarity_dense/", "similarity_dense/"),
    )

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.backbone.embed_dim
        self.dropout = config.cross_dropout
        self.position_embeddings = nnx.Embed(
            config.backbone.context_length, width, embedding_init=normal(0.02), rngs=rngs
        )
        self.transformer = Transformer(
            new_block_config(config.backbone)._replace(heads=_HEADS),
            config.cross_layers,
            init=new_block_init(),
            # It runs on every pair of the batch: stored activations would not fit in memory.
            run=dataclasses.replace(config, remat="full"),
            rngs=rngs,
        )
        self.ln_pool = layer_norm(width, BERT_LN_EPS, rngs=rngs)
        self.dense = nnx.Linear(width, width, kernel_init=normal(0.02), rngs=rngs)
        self.similarity_dense = nnx.Linear(width, 1, kernel_init=normal(0.02), rngs=rngs)

    def encode_text(self, text: TextFeatures, text_mask: jax.Array) -> Arrays:
        return {"sentence_feat": text.sentence}

    def encode_video(self, frame_feat: jax.Array, frame_mask: jax.Array) -> Arrays:
        return {"frame_feat": frame_feat, "frame_mask": frame_mask}

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        sentence, frames, mask = text["sentence_feat"], video["frame_feat"], video["frame_mask"]
        (texts, width), (videos, length) = sentence.shape, mask.shape
        sentence = jnp.broadcast_to(sentence[:, None, None], (texts, videos, 1, width))
        frames = jnp.broadcast_to(frames, (texts, *frames.shape))
        x = jnp.concatenate([sentence, frames], axis=2)  # [A, B, 1+F, D]
        x = x + self.position_embeddings(jnp.arange(1 + length))
        if key is not None and self.dropout:
            x = nnx.Dropout(self.dropout)(x, rngs=nnx.Rngs(dropout=key))
        lengths = jnp.tile(1 + lengths_of(mask), texts)  # [A*B]
        x = x.reshape(-1, 1 + length, width)
        x = self.transformer(x, AttentionMask(lengths=lengths), queries=1)  # [A*B, 1, D]
        pooled = quick_gelu(self.dense(self.ln_pool(x[:, 0])))
        logits = linear_without_bias_gradient(self.similarity_dense, pooled)
        return logits.reshape(texts, videos)

    @classmethod
    def config_error(cls, config: ModelConfig) -> str:
        width = config.backbone.embed_dim
        if width % _HEADS:
            return f"model.backbone.embed_dim={width} must be a multiple of xti's {_HEADS} heads"
        return ""

    @classmethod
    def config_of_weights(cls, names: Collection[str]) -> dict[str, Any] | None:
        if "similarity_dense.weight" not in names:
            return None
        return {"cross_layers": count_blocks(names, "cross.transformer")}

    @classmethod
    def video_as_text(cls, video: Features) -> Features:
        """The sentence of a video is the mean of its unit frames."""
        frames, mask = unit_features(video, "frame"), video["frame_mask"]
        mean = (frames * mask[..., None]).sum(1) / np.maximum(mask.sum(1), 1)[:, None]
        return {**frames_as_tokens(video), "sentence_feat": mean}
