"""Random towers of each family, small enough to write to a file in a moment."""

import dataclasses
import re

import numpy as np

from drl_jax.config import BackboneConfig, ModelConfig
from drl_jax.models.drl import BACKBONES, param_shapes
from drl_jax.models.reference_names import state_dict_from_params

TINY = BackboneConfig(
    embed_dim=128,
    image_resolution=32,
    vision_layers=1,
    vision_width=64,
    vision_heads=1,
    vision_patch_size=16,
    vocab_size=20,
    context_length=16,
    text_width=64,
    text_heads=1,
    text_layers=1,
)


def tiny_state(**changes) -> dict[str, np.ndarray]:
    """Random towers under OpenAI's names; `changes` are of BackboneConfig."""
    backbone = dataclasses.replace(TINY, **changes)
    assert not BACKBONES[backbone.family].config_error(backbone)
    config = ModelConfig(backbone=backbone, interaction="dp", agg_module="none")
    shapes = {"backbone": param_shapes(config)["backbone"]}
    rng = np.random.default_rng(0)

    def draw(tree):
        if isinstance(tree, dict):
            return {name: draw(child) for name, child in tree.items()}
        return np.asarray(0.1 * rng.normal(size=tree.shape), np.float32)

    state = state_dict_from_params(draw(shapes))
    return {name.removeprefix("clip."): tensor for name, tensor in state.items()}


SIGLIP = {
    "family": "siglip",
    "embed_dim": 64,
    "context_length": 64,
    "logit_bias": True,
    "vision_mlp_width": 96,
    "text_mlp_width": 80,
}
PE = {"family": "pe", "context_length": 32}


def to_hugging_face(state):
    """OpenAI's names -> Hugging Face's, as their converter writes them."""
    rules = (
        ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
        ("transformer.resblocks.", "text_model.encoder.layers."),
        (".attn.out_proj.", ".self_attn.out_proj."),
        (".ln_1.", ".layer_norm1."),
        (".ln_2.", ".layer_norm2."),
        (".c_fc.", ".fc1."),
        (".c_proj.", ".fc2."),
        ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("visual.proj", "visual_projection.weight"),
        ("text_projection", "text_projection.weight"),
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("ln_final.", "text_model.final_layer_norm."),
    )
    renamed = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    for name, value in state.items():
        if name == "positional_embedding":
            renamed["text_model.embeddings.position_embedding.weight"] = value
            continue
        transposed = name in ("visual.proj", "text_projection")
        for old, new in rules:
            name = name.replace(old, new, 1) if old in name else name
        if match := re.match(r"(.*)\.attn\.in_proj_(weight|bias)$", name):
            for part, piece in zip("qkv", np.split(value, 3), strict=True):
                renamed[f"{match[1]}.self_attn.{part}_proj.{match[2]}"] = piece
        else:
            renamed[name] = np.ascontiguousarray(value.T) if transposed else value
    return renamed
