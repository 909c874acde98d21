"""The model of the paper: backbone, temporal head and interaction."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from drl_jax.config import Config, ModelConfig, checked_config
from drl_jax.models.clip import CLIP
from drl_jax.models.extracted import ExtractedBackbone, as_text_features
from drl_jax.models.extractors import EXTRACTORS
from drl_jax.models.interactions import INTERACTIONS, Arrays
from drl_jax.models.interactions.base import similarity_in_blocks
from drl_jax.models.linear import without_adapters
from drl_jax.models.pe import PerceptionEncoder
from drl_jax.models.siglip import SigLIP
from drl_jax.models.temporal import TEMPORAL_HEADS
from drl_jax.models.towers import Backbone, TextFeatures
from drl_jax.runtime.sharding import Layout

Params = dict[str, Any]

BACKBONES: dict[str, type[Backbone]] = {"clip": CLIP, "siglip": SigLIP, "pe": PerceptionEncoder}


def families() -> dict[str, Any]:
    """The classes of backbones by `BackboneConfig.family`, with registered extractors."""
    return {**BACKBONES, **dict.fromkeys(EXTRACTORS, ExtractedBackbone)}


class DRL(nnx.Module):
    """Text-video similarity.

    Texts and videos are encoded separately into the arrays that the interaction compares, so
    evaluation encodes every caption and every video once.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.backbone = families()[config.backbone.family](config, rngs=rngs)
        head = TEMPORAL_HEADS[config.agg_module]
        self.temporal = head and head(config, rngs=rngs)
        self.interaction = INTERACTIONS[config.interaction](config, rngs=rngs)
        self.similarity_block = config.similarity_block

    def encode_text(self, text_ids: jax.Array, text_mask: jax.Array) -> Arrays:
        """int32 [A, L], bool [A, L] -> the interaction's arrays of the texts."""
        text = self.text_features(text_ids, text_mask)
        return self.interaction.encode_text(text, text_mask)

    def text_features(self, text_ids: jax.Array, text_mask: jax.Array) -> TextFeatures:
        """int32 [A, L], bool [A, L] -> features of tokens and sentences.

        Instead of `text_ids`, the features themselves, [A, 1 + L, D], as they are stored: of the
        sentence and then of each token.
        """
        if text_ids.ndim == 3:
            return as_text_features(text_ids)
        return self.backbone.encode_text(text_ids, text_mask)

    def encode_video(self, frames: jax.Array, frame_mask: jax.Array) -> Arrays:
        """uint8 [B, F, H, W, 3], bool [B, F] -> the interaction's arrays of the videos."""
        return self.interaction.encode_video(self.frame_features(frames, frame_mask), frame_mask)

    def frame_features(self, frames: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """uint8 [B, F, H, W, 3], bool [B, F] -> frame_feat [B, F, D], after the temporal head."""
        return self.aggregate(self.image_features(frames, frame_mask), frame_mask)

    def image_features(self, frames: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """uint8 [B, F, H, W, 3], bool [B, F] -> features of single frames [B, F, D].

        Instead of `frames`, the features themselves, [B, F, D], as they are stored.
        """
        if frames.ndim == 3:
            return frames.astype(jnp.float32)
        images = frames.reshape(-1, *frames.shape[2:])  # [B*F, H, W, 3]
        image_feat = self.backbone.encode_image(images, frame_mask.reshape(-1))  # [B*F, D]
        return image_feat.reshape(*frame_mask.shape, -1)

    def aggregate(self, image_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """Features of single frames [B, F, D], bool [B, F] -> frame_feat [B, F, D]."""
        return image_feat if self.temporal is None else self.temporal(image_feat, frame_mask)

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        """sim_matrix float32 [A, B], without the temperature; `key` enables dropout."""
        compare = functools.partial(self.interaction.similarity, text)
        return similarity_in_blocks(compare, video, key, self.similarity_block)


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """Builds a Config from a nested dict, as `dataclasses.asdict` returns it; see `checked_config`.

    Raises:
      ConfigError: a value is wrong, or the model cannot be built.
    """
    return checked_config(values, families(), INTERACTIONS, TEMPORAL_HEADS)


class _SameKey(nnx.RngStream):
    """As `nnx.Rngs`, with the same key each time: counting takes a third of the time of a trace."""

    def __call__(self) -> jax.Array:
        return self.key[...]

    @property
    def params(self) -> "_SameKey":
        return self


def _abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    heads = INTERACTIONS[config.interaction], TEMPORAL_HEADS[config.agg_module]
    return _traced_model(config, heads)


@functools.cache
def _traced_model(
    config: ModelConfig, heads: tuple[type | None, ...]
) -> tuple[nnx.GraphDef, Params]:
    # Tracing takes a part of a second, and several callers of a process need the same model.
    # Another class of the same name makes another one.
    del heads

    def trace() -> DRL:
        return DRL(config, rngs=_SameKey(0, tag="params"))  # type: ignore[arg-type]

    definition, params = nnx.split(nnx.eval_shape(trace))
    return definition, nnx.to_pure_dict(params)


def model_definition(config: ModelConfig, frozen_layers: tuple[int, int] = (0, 0)) -> nnx.GraphDef:
    """The model without parameters; `nnx.merge(definition, params)` reconstructs the model.

    The first layers of the image and of the text tower, as many as `frozen_layers`, get no
    gradient.
    """
    definition, params = _abstract_model(config)
    if not any(frozen_layers):
        return definition
    model = nnx.merge(definition, params)
    backbone = model.backbone
    backbone.visual.transformer.frozen_layers, backbone.transformer.frozen_layers = frozen_layers
    return nnx.split(model)[0]


def param_shapes(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`), without their memory."""
    return jax.tree.map(lambda leaf: leaf, _abstract_model(config)[1])


def abstract_params(config: ModelConfig, layout: Layout) -> Params:
    """Shapes, dtypes and shardings of the parameters, without their memory."""
    return layout.abstract(param_shapes(config))


def init_params(config: ModelConfig, key: jax.Array, backbone: Params | None = None) -> Params:
    """New parameters as a nested dict; heads start as copies of the text tower (`copy_text_tower`).

    `backbone` has the parameters of a pretrained one, adapters are added to it if it has none;
    under `jax.jit`, none are drawn for it then.
    """
    params = nnx.to_pure_dict(nnx.split(DRL(config, rngs=nnx.Rngs(key)))[1])
    if backbone is not None:
        new = flatten_dict(params["backbone"])
        params["backbone"] = unflatten_dict(new | flatten_dict(backbone))
    return copy_text_tower(config, params)


def copies_text_tower(config: ModelConfig) -> bool:
    """Whether blocks of the text tower fit the heads, which have the width of the features."""
    has_tower = config.backbone.family not in EXTRACTORS
    return has_tower and config.backbone.text_width == config.backbone.embed_dim


def copy_text_tower(config: ModelConfig, params: Params) -> Params:
    """Initialises position embeddings and blocks of the heads with those of the text tower.

    Copies as many blocks as both have ("Initialization trick" of the reference), and no frame
    positions with `position_std`. Where the text tower has another width than the features, the
    heads stay as they are (`copies_text_tower`). `params` are not changed.
    """
    if not copies_text_tower(config):
        return params
    backbone, params = without_adapters(params["backbone"]), dict(params)
    for name, head in (
        ("temporal", TEMPORAL_HEADS[config.agg_module]),
        ("interaction", INTERACTIONS[config.interaction]),
    ):
        if head is None or not head.COPIED_POSITIONS:
            continue
        new = params[name] = dict(params[name])
        if name != "temporal" or not config.position_std:
            new[head.COPIED_POSITIONS] = {"embedding": backbone["positional_embedding"]}
        new["transformer"] = jax.tree.map(
            copy_first_blocks, new["transformer"], backbone["transformer"]
        )
    return params


def copy_first_blocks(new: jax.Array, old: jax.Array) -> jax.Array:
    """A stacked parameter of blocks with the first ones of another: [N, ...], [M, ...]."""
    count = min(len(new), len(old))
    return new.at[:count].set(old[:count])
