"""The table of names: our parameters on one side, the reference's state dict on the other.

The reference's names are OpenAI's for CLIP, prefixed with `clip.`, and DRL's own for the heads.
Ours differ in three ways: layers of a transformer are stacked on a leading axis, kernels are
[in, out] where torch's are [out, in], and a few heads are called by what they are.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

# (pattern of our path, the reference's name), applied in order; `{n}` becomes the layer.
_TABLE = (
    (r"^temporal/transformer/", "transformerClip/"),
    (r"^temporal/frame_position_embeddings/", "frame_position_embeddings/"),
    (r"^temporal/(ih|hh)/kernel$", r"lstm_visual/weight_\1_l0"),
    (r"^temporal/(ih|hh)/bias$", r"lstm_visual/bias_\1_l0"),
    (r"^interaction/(text|video)_weight_fc/fc/", r"\1_weight_fc/"),
    (r"^interaction/position_embeddings/", "cross/embeddings/position_embeddings/"),
    (r"^interaction/transformer/", "cross/transformer/"),
    (r"^interaction/(ln_pool|dense)/", r"cross/pooler/\1/"),
    (r"^interaction/similarity_dense/", "similarity_dense/"),
    (r"/resblocks/", "/resblocks/{n}/"),
    (r"/in_proj/kernel$", "/in_proj_weight"),
    (r"/in_proj/bias$", "/in_proj_bias"),
    (r"/(kernel|scale|embedding)$", "/weight"),
    (r"/", "."),
)


class Entry(NamedTuple):
    """A parameter of ours and the tensors of the reference that it is made of."""

    path: str
    shape: tuple[int, ...]
    names: list[str]
    stacked: bool

    def from_reference(self, tensors: list[np.ndarray]) -> np.ndarray:
        """The reference's tensors -> our parameter, float32."""
        arrays = [_transposed(self.path, np.asarray(tensor, np.float32)) for tensor in tensors]
        return np.stack(arrays) if self.stacked else arrays[0]

    def to_reference(self, parameter: np.ndarray) -> list[np.ndarray]:
        """Our parameter -> the reference's tensors."""
        layers = list(parameter) if self.stacked else [parameter]
        return [_transposed_back(self.path, layer, self.shape) for layer in layers]

    def reference_shape(self) -> tuple[int, ...]:
        """Shape of each of the reference's tensors."""
        layer = np.broadcast_to(np.float32(0), self.shape[1:] if self.stacked else self.shape)
        return _transposed_back(self.path, layer, self.shape).shape


def entries(params: Any) -> Iterator[Entry]:
    """An entry for each parameter of a (possibly abstract) nested dict."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = {"/".join(str(key.key) for key in path): leaf for path, leaf in leaves}
    for path, leaf in paths.items():
        name = path
        for pattern, replacement in _TABLE:
            name = re.sub(pattern, replacement, name)
        name = _weight_layer(name, paths)
        stacked = "{n}" in name
        layers = range(leaf.shape[0]) if stacked else range(1)
        yield Entry(path, tuple(leaf.shape), [name.format(n=n) for n in layers], stacked)


def _weight_layer(name: str, paths: dict[str, Any]) -> str:
    """`text_weight_fc.1.weight` -> torch's number in a Sequential of linear layers and ReLUs.

    With one layer only, the reference has no Sequential around it.
    """
    match = re.match(r"(text|video)_weight_fc\.(\d+)\.(.*)", name)
    if not match:
        return name
    side, layer, leaf = match.groups()
    if f"interaction/{side}_weight_fc/fc/1/kernel" not in paths:
        return f"{side}_weight_fc.{leaf}"
    return f"{side}_weight_fc.{2 * int(layer)}.{leaf}"


def _transposed(path: str, tensor: np.ndarray) -> np.ndarray:
    if path.endswith("conv1/kernel") and tensor.ndim == 4:
        # [D, 3, p, p] -> rows in the order of a patch's pixels, [p*p*3, D]
        return tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0])
    return tensor.T if path.endswith("/kernel") else tensor


def _transposed_back(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if path.endswith("conv1/kernel"):
        patch = round((shape[0] / 3) ** 0.5)
        return array.reshape(patch, patch, 3, -1).transpose(3, 2, 0, 1)
    return array.T if path.endswith("/kernel") else array


# ---------------------------------------------------------------- Hugging Face's names


_HUGGING_FACE = (
    (r"^logit_scale$", "logit_scale"),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),  # sic
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^visual_projection\.weight$", "visual.proj"),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    (r"\.self_attn\.", ".attn."),
)


def is_hugging_face(state: dict[str, np.ndarray]) -> bool:
    return any(name.startswith(("text_model.", "vision_model.")) for name in state)


def from_hugging_face(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face's CLIP -> OpenAI's names: query, key and value become one projection."""
    renamed = {}
    for name, tensor in state.items():
        if name.endswith(".position_ids"):
            continue  # 0, 1, 2, ...
        transposed = name in ("text_projection.weight", "visual_projection.weight")
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.T if transposed else tensor
    fused = {}
    for name, tensor in renamed.items():
        query = re.sub(r"\.attn\.[kv]_proj\.", ".attn.q_proj.", name)
        if query != name and query in renamed:
            continue  # it goes into the projection of its query
        if match := re.match(r"(.*\.attn)\.q_proj\.(weight|bias)$", name):
            parts = [f"{match[1]}.{part}_proj.{match[2]}" for part in "qkv"]
            if all(part in renamed for part in parts):
                tensor = np.concatenate([renamed[part] for part in parts])
                name = f"{match[1]}.in_proj_{match[2]}"
        fused[name] = tensor
    return fused
