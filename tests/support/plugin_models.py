"""A plugin: two interactions and a temporal head."""

import jax.numpy as jnp
from flax import nnx

import drl_jax
from drl_jax.models.interactions import Interaction
from drl_jax.models.interactions.token_wise import WeightedTokenWise
from drl_jax.models.ops import l2_normalize
from drl_jax.models.temporal import TemporalHead


class Halved(WeightedTokenWise):
    def similarity(self, text, video, key=None):
        return super().similarity(text, video, key) / 2


class Best(Interaction):
    """Cosine of the scaled sentence and its best frame."""

    TEXT_ARRAYS = ("sentence_unit",)
    VIDEO_ARRAYS = ("frame_unit", "frame_mask")

    def __init__(self, config, *, rngs):
        self.scale = nnx.Param(jnp.ones(config.backbone.embed_dim))

    def encode_text(self, text, text_mask):
        return {"sentence_unit": l2_normalize(text.sentence * self.scale[...])}

    def encode_video(self, frame_feat, frame_mask):
        return {"frame_unit": l2_normalize(frame_feat), "frame_mask": frame_mask}

    def similarity(self, text, video, key=None):
        cosine = jnp.einsum("ad,bfd->abf", text["sentence_unit"], video["frame_unit"])
        return jnp.where(video["frame_mask"], cosine, -1).max(axis=2)


class Mixed(TemporalHead):
    def __init__(self, config, *, rngs):
        width = config.backbone.embed_dim
        self.conv1 = nnx.Linear(width, width, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, frame_feat, frame_mask):
        return frame_feat + self.conv1(frame_feat)


drl_jax.register_interaction("halved", Halved)
drl_jax.register_interaction("best", Best)
drl_jax.register_temporal_head("mixed", Mixed)
