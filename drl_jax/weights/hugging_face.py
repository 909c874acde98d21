"""Hugging Face's names of CLIP and SigLIP, and ours, which are OpenAI's."""

import re
from collections.abc import Iterable

import numpy as np

State = dict[str, np.ndarray]

# (Hugging Face's, ours): how names begin.
_COMMON = (
    ("text_model.embeddings.token_embedding.", "token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # sic
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
)
_BEGINNINGS = {
    "clip": (
        *_COMMON,
        ("text_projection.weight", "text_projection"),
        ("visual_projection.weight", "visual.proj"),
    ),
    "siglip": (
        *_COMMON,
        ("text_model.head.", "text_projection."),
        ("vision_model.head.probe", "visual.attn_pool.probe"),
        ("vision_model.head.attention.", "visual.attn_pool.attn."),
        ("vision_model.head.layernorm.", "visual.attn_pool.layernorm."),
        ("vision_model.head.mlp.fc1.", "visual.attn_pool.mlp.c_fc."),
        ("vision_model.head.mlp.fc2.", "visual.attn_pool.mlp.c_proj."),
    ),
}
# Parts of names within a layer.
_IN_LAYER = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.", ".attn."),
)
# Our names of matrices that Hugging Face transposes.
_TRANSPOSED = ("text_projection", "visual.proj")
# Scalars, which SigLIP stores as vectors of one element.
_SCALARS = ("logit_scale", "logit_bias")


def is_hugging_face(state: State) -> bool:
    return any(name.startswith(("text_model.", "vision_model.")) for name in state)


def from_hugging_face(state: State) -> State:
    """Hugging Face's names -> ours: query, key and value become one projection.

    Names that belong to neither CLIP nor SigLIP stay as they are.
    """
    family = "siglip" if "vision_model.head.probe" in state else "clip"
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(".position_ids"):
            continue  # 0, 1, 2, ...
        ours = _renamed(name, _BEGINNINGS[family], _IN_LAYER)
        if ours in _SCALARS:
            tensor = tensor.reshape(())
        renamed[ours] = tensor.T if family == "clip" and ours in _TRANSPOSED else tensor
    fused = {}
    for name, tensor in renamed.items():
        query = re.sub(r"\.attn\.[kv]_proj\.", ".attn.q_proj.", name)
        if query != name and query in renamed:
            continue  # Part of the fused projection, added with the query.
        if match := re.match(r"(.*\.attn)\.q_proj\.(weight|bias)$", name):
            parts = [f"{match[1]}.{part}_proj.{match[2]}" for part in "qkv"]
            if all(part in renamed for part in parts):
                tensor = np.concatenate([renamed[part] for part in parts])
                name = f"{match[1]}.in_proj_{match[2]}"
        fused[name] = tensor
    return fused


def siglip_to_hugging_face(state: State) -> State:
    """Our names of SigLIP -> Hugging Face's; the reverse of `from_hugging_face`."""
    beginnings = [(ours, theirs) for theirs, ours in _BEGINNINGS["siglip"]]
    in_layer = [(ours, theirs) for theirs, ours in _IN_LAYER]
    named = {}
    for name, tensor in state.items():
        if name in _SCALARS:
            tensor = tensor.reshape(1)
        if match := re.match(r"(.*resblocks\.\d+\.attn)\.in_proj_(weight|bias)$", name):
            for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                theirs = _renamed(f"{match[1]}.{part}_proj.{match[2]}", beginnings, in_layer)
                named[theirs] = rows
        else:
            named[_renamed(name, beginnings, in_layer)] = tensor
    return named


def _renamed(
    name: str, beginnings: Iterable[tuple[str, str]], in_layer: Iterable[tuple[str, str]]
) -> str:
    """A name with another beginning and, within a layer, other parts; unchanged if none fits."""
    for old, new in beginnings:
        if name.startswith(old):
            renamed = new + name.removeprefix(old)
            break
    else:
        return name
    if ".layers." in old or ".resblocks." in old:
        for old_part, new_part in in_layer:
            renamed = renamed.replace(old_part, new_part)
    return renamed
