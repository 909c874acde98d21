"""Parameter names: ours, those of the reference's state dict, and of publishers of towers.

The reference uses OpenAI's names for the towers, with the prefix `clip.`, and its own names for the
heads, which each head translates (`reference_name`); heads that it does not have keep ours. Two
differences are common to all: layers of a transformer are stacked on a leading axis, and kernels
are [in, out] where torch's are [out, in].
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from drl_jax.models.interactions import INTERACTIONS
from drl_jax.models.temporal import TEMPORAL_HEADS

# (pattern of our path, the reference's name), applied in order; `{n}` stands for the layer.
_SUFFIXES = (
    (r"/resblocks/", "/resblocks/{n}/"),
    (r"/in_proj/kernel$", "/in_proj_weight"),
    (r"/in_proj/bias$", "/in_proj_bias"),
    (r"/(kernel|scale|embedding)$", "/weight"),
    (r"/", "."),
)
_HEADS = {"interaction": INTERACTIONS, "temporal": TEMPORAL_HEADS}


class Entry(NamedTuple):
    """One of our parameters and the tensors of the reference that hold it."""

    path: str  # of our parameter, separated by "/"
    shape: tuple[int, ...]  # of our parameter
    names: list[str]  # of the reference's tensors, one for each layer
    stacked: bool  # whether our parameter has a leading axis of layers

    def tensors_in(self, parameter: np.ndarray) -> list[np.ndarray]:
        """The reference's tensors as views of our parameter: to read them, or to fill it."""
        layers = list(parameter) if self.stacked else [parameter]
        if self.path.startswith("backbone/") and self.path.endswith("conv1/kernel"):
            # [p*p*3, D], rows in the order of the pixels of a patch -> [D, 3, p, p]
            patch = round((self.shape[0] / 3) ** 0.5)
            return [x.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1) for x in layers]
        return [layer.T for layer in layers] if self.path.endswith("/kernel") else layers

    def reference_shape(self) -> tuple[int, ...]:
        """Shape of each of the reference's tensors."""
        return self.tensors_in(np.broadcast_to(np.float32(0), self.shape))[0].shape


def entries(params: Any) -> Iterator[Entry]:
    """Yields an entry for each parameter of a (possibly abstract) nested dict, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    for path, leaf in paths.items():
        name = _reference_path(path, paths)
        for pattern, replacement in _SUFFIXES:
            name = re.sub(pattern, replacement, name)
        stacked = "{n}" in name
        layers = range(leaf.shape[0]) if stacked else range(1)
        yield Entry(path, tuple(leaf.shape), [name.format(n=n) for n in layers], stacked)


def _reference_path(path: str, paths: dict[str, Any]) -> str:
    """The path below the reference's names of the modules."""
    module, _, rest = path.partition("/")
    if module == "backbone":
        return f"clip/{rest}"
    siblings = {p.partition("/")[2] for p in paths if p.startswith(f"{module}/")}
    for head in filter(None, _HEADS[module].values()):
        if name := head.reference_name(rest, siblings):
            return name
    return path.replace("/", ".")  # Of a head that the reference does not have.


def state_dict_from_params(params: Any) -> dict[str, np.ndarray]:
    """Parameters -> the reference's state dict, contiguous arrays of the same dtype."""
    return {
        name: np.ascontiguousarray(tensor) if tensor.ndim else tensor
        for entry, leaf in zip(entries(params), jax.tree.leaves(params), strict=True)
        for name, tensor in zip(entry.names, entry.tensors_in(np.asarray(leaf)), strict=True)
    }


# ---------------------------------------------------------------- publishers' names of towers

# (theirs, OpenAI's): how names begin; and parts, with dots around them, of names with one of these
# beginnings. Other names stay as they are.
Names = tuple[tuple[str, str], ...]

_MLP = ((".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."))
_HUGGING_FACE = (
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
    *((".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".self_attn.", ".attn."), *_MLP),
)
CLIP_HF = (
    *_HUGGING_FACE,
    *(("text_projection.weight", "text_projection"), ("visual_projection.weight", "visual.proj")),
)
# open_clip's CustomTextCLIP, and timm's image towers in it.
CUSTOM_TEXT = (("text.", ""),)
TIMM = (
    ("visual.trunk.cls_token", "visual.class_embedding"),
    ("visual.trunk.pos_embed", "visual.positional_embedding"),
    ("visual.trunk.patch_embed.proj.", "visual.conv1."),
    ("visual.trunk.norm_pre.", "visual.ln_pre."),
    ("visual.trunk.norm.", "visual.ln_post."),
    ("visual.trunk.head.weight", "visual.proj"),
    ("visual.trunk.attn_pool.latent", "visual.attn_pool.probe"),
    ("visual.trunk.attn_pool.norm.", "visual.attn_pool.layernorm."),
    ("visual.trunk.attn_pool.mlp.", "visual.attn_pool.mlp."),
    ("visual.trunk.attn_pool.proj.", "visual.attn_pool.attn.out_proj."),
    ("visual.trunk.attn_pool.q.", "visual.attn_pool.attn.q_proj."),
    ("visual.trunk.attn_pool.kv.", "visual.attn_pool.attn.kv_proj."),
    ("visual.trunk.blocks.", "visual.transformer.resblocks."),
    *((".norm1.", ".ln_1."), (".norm2.", ".ln_2."), *_MLP),
    *((".attn.qkv.", ".attn.in_proj_"), (".attn.proj.", ".attn.out_proj."), *CUSTOM_TEXT),
)
SIGLIP_HF = (
    *_HUGGING_FACE,
    ("text_model.head.", "text_projection."),
    ("vision_model.head.attention.", "visual.attn_pool.attn."),
    ("vision_model.head.", "visual.attn_pool."),
)


def renamed(name: str, names: Names, *, back: bool = False) -> str:
    """A publisher's name of a tensor -> OpenAI's; or with `back`, the reverse."""
    pairs = [pair[::-1] for pair in names] if back else names
    for old, new in pairs:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            for part, new_part in pairs:
                name = name.replace(part, new_part) if part.startswith(".") else name
            return name
    return name


def to_publisher(state: Mapping[str, np.ndarray], names: Names) -> dict[str, np.ndarray]:
    """Towers under OpenAI's names -> under a publisher's, without fused projections."""
    named = {}
    for name, tensor in state.items():
        if match := re.match(r"(.*resblocks\.\d+\.attn)\.in_proj_(weight|bias)$", name):
            for part, rows in zip("qkv", np.split(tensor, 3), strict=True):
                named[renamed(f"{match[1]}.{part}_proj.{match[2]}", names, back=True)] = rows
        else:
            named[renamed(name, names, back=True)] = tensor if tensor.ndim else tensor.reshape(1)
    return named
