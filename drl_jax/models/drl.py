"""The paper's model, composed of its parts: CLIP towers, temporal head, interaction."""

import functools
from typing import Any

import jax
from flax import nnx

from drl_jax.config import ModelConfig
from drl_jax.models.clip import CLIP, normalize_frames
from drl_jax.models.interaction import INTERACTIONS, Arrays, over_video_blocks
from drl_jax.models.temporal import HEADS

Params = dict[str, Any]


class DRL(nnx.Module):
    """Text-video similarity.

    Each side is encoded alone, into the named arrays that the interaction compares, so evaluation
    embeds every caption and every video once.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.clip = CLIP(config, rngs=rngs)
        head = HEADS[config.agg_module]
        self.temporal = head and head(config, rngs=rngs)
        self.interaction = INTERACTIONS[config.interaction](config, rngs=rngs)
        self.similarity_block = config.similarity_block

    def encode_text(self, text_ids: jax.Array, text_mask: jax.Array) -> Arrays:
        """int32 [A, L], bool [A, L] -> the interaction's arrays of the texts."""
        return self.interaction.text(self.clip.encode_text(text_ids), text_mask)

    def encode_frames(self, frames: jax.Array, frame_mask: jax.Array) -> Arrays:
        """uint8 [B, F, H, W, 3], bool [B, F] -> the interaction's arrays of the videos."""
        return self.interaction.video(self.frame_features(frames, frame_mask), frame_mask)

    def frame_features(self, frames: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """uint8 [B, F, H, W, 3], bool [B, F] -> frame_feat [B, F, D], after the temporal head."""
        pixels = normalize_frames(frames, frame_mask)
        feat = self.clip.visual(pixels.reshape(-1, *pixels.shape[2:]))  # [B*F, D]
        frame_feat = feat.reshape(*frame_mask.shape, -1)
        return frame_feat if self.temporal is None else self.temporal(frame_feat, frame_mask)

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        """sim_matrix float32 [A, B], without the temperature; `key` is for dropout in training."""
        compare = functools.partial(self.interaction.similarity, text)
        return over_video_blocks(compare, video, key, self.similarity_block)


def model_definition(config: ModelConfig) -> nnx.GraphDef:
    """The model without its parameters: `nnx.merge(definition, params)` makes it whole."""
    return nnx.split(nnx.eval_shape(lambda: DRL(config, rngs=nnx.Rngs(0))))[0]


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters as a nested dict; the heads start as copies of the text tower.

    The copies are the reference's: see `copy_text_tower`. With `position_std`, frames get positions
    of their own.
    """
    params = nnx.to_pure_dict(nnx.split(DRL(config, rngs=nnx.Rngs(key)))[1])
    return copy_text_tower(config, params)


def copy_text_tower(config: ModelConfig, params: Params) -> Params:
    """Starts the position embeddings and the first blocks of the heads as the text tower's.

    As many blocks are copied as both have ("Initialization trick" of the reference).

    Args:
      config: the model.
      params: its parameters, with CLIP's in their final values; not changed.

    Returns:
      The parameters with fresh heads.
    """
    text = params["clip"]
    params = dict(params)
    copies = []
    if config.agg_module == "seqTransf":
        positions = None if config.position_std else "frame_position_embeddings"
        copies.append(("temporal", positions))
    if config.interaction == "xti":
        copies.append(("interaction", "position_embeddings"))
    for name, positions in copies:
        head = params[name] = dict(params[name])
        if positions:
            head[positions] = {"embedding": text["positional_embedding"]}
        new, old = head["transformer"]["resblocks"], text["transformer"]["resblocks"]
        head["transformer"] = {"resblocks": jax.tree.map(_copy_first_blocks, new, old)}
    return params


def _copy_first_blocks(new: jax.Array, old: jax.Array) -> jax.Array:
    count = min(len(new), len(old))
    return new.at[:count].set(old[:count])
