"""The paper's model, composed of its parts: CLIP towers, temporal head, WTI."""

from typing import Any

import jax
from flax import nnx

from drl_jax.config import ModelConfig
from drl_jax.models.clip import CLIP, normalize_frames
from drl_jax.models.interaction import TokenWeight, weighted_token_wise
from drl_jax.models.temporal import SequenceTransformer

Params = dict[str, Any]


class DRL(nnx.Module):
    """Text-video similarity.

    Texts are `text_feat [A,L,D]`, `text_mask [A,L]`, `text_weight [A,L]`; videos are `frame_feat
    [B,F,D]`, `frame_mask [B,F]`, `frame_weight [B,F]`. Each side is encoded alone, so evaluation
    embeds every caption and every video once.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.clip.embed_dim
        self.clip = CLIP(config, rngs=rngs)
        self.temporal = SequenceTransformer(config, rngs=rngs)
        self.text_weight_fc = TokenWeight(width, rngs=rngs)
        self.video_weight_fc = TokenWeight(width, rngs=rngs)

    def encode_text(self, text_ids: jax.Array, text_mask: jax.Array) -> dict[str, jax.Array]:
        """int32 [A, L], bool [A, L] -> the three arrays of a text."""
        text_feat = self.clip.encode_text(text_ids)
        return {
            "text_feat": text_feat,
            "text_mask": text_mask,
            "text_weight": self.text_weight_fc(text_feat, text_mask),
        }

    def encode_frames(self, frames: jax.Array, frame_mask: jax.Array) -> dict[str, jax.Array]:
        """uint8 [B, F, H, W, 3], bool [B, F] -> the three arrays of a video."""
        pixels = normalize_frames(frames, frame_mask)
        feat = self.clip.visual(pixels.reshape(-1, *pixels.shape[2:]))  # [B*F, D]
        frame_feat = self.temporal(feat.reshape(*frame_mask.shape, -1), frame_mask)
        return {
            "frame_feat": frame_feat,
            "frame_mask": frame_mask,
            "frame_weight": self.video_weight_fc(frame_feat, frame_mask),
        }

    def similarity(self, text: dict[str, jax.Array], video: dict[str, jax.Array]) -> jax.Array:
        """sim_matrix float32 [A, B], without the temperature."""
        return weighted_token_wise(**text, **video)


def model_definition(config: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters: `nnx.merge(definition, params)` makes it whole."""
    return nnx.split(nnx.eval_shape(lambda: DRL(config, rngs=nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters as a nested dict; the temporal head starts as a copy of the text tower.

    The copy is the reference's: as many of the temporal blocks as the text tower has, and, unless
    `position_std` is set, `frame_position_embeddings` from `positional_embedding`.
    """
    params = nnx.to_pure_dict(nnx.split(DRL(config, rngs=nnx.Rngs(key)))[1])
    clip, temporal = params["clip"], params["temporal"]
    if not config.position_std:
        temporal["frame_position_embeddings"]["embedding"] = clip["positional_embedding"]
    copied = min(config.temporal_layers, config.clip.text_layers)
    temporal["transformer"]["resblocks"] = jax.tree.map(
        lambda new, old: new.at[:copied].set(old[:copied]),
        temporal["transformer"]["resblocks"],
        clip["transformer"]["resblocks"],
    )
    return params
