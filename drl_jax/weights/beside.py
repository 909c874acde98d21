"""Descriptions of towers in JSON files beside their weights: Hugging Face's, open_clip's and ours.

Each reader returns fields of BackboneConfig. What it cannot represent, it refuses.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import ACTIVATIONS, INTERPOLATIONS, RESIZES, TEXT_CLEANINGS, BackboneConfig
from drl_jax.weights.errors import WeightsError, about, read_json
from drl_jax.weights.families import FAMILIES, SUPPORTED
from drl_jax.weights.folders import PREPROCESSORS
from drl_jax.weights.json_values import COUNT, FLAG, FRACTION, RGB, TEXT, JSONValues, one_of, whole

# What a field of BackboneConfig may hold.
_OF_TYPE = {bool: FLAG, int: COUNT, float: FRACTION, str: TEXT}
_KINDS = {
    **{f.name: _OF_TYPE.get(f.type, RGB) for f in dataclasses.fields(BackboneConfig)},
    **dict.fromkeys(("activation", "text_activation"), one_of(ACTIVATIONS)),
    **{"resize": one_of(RESIZES), "interpolation": one_of(INTERPOLATIONS)},
    **{"text_cleaning": one_of(TEXT_CLEANINGS), "pad_id": whole(0)},
}
# Short names of fields in a config.json of ours.
_SHORT = {
    **{"mean": "pixel_mean", "std": "pixel_std", "pad": "pad_id", "patch": "vision_patch_size"},
    **{"image_size": "image_resolution", "context": "context_length"},
}
# Of Hugging Face's "model_type".
_MODEL_TYPES = {"clip": "clip", "metaclip_2": "clip", "siglip": "siglip", "siglip2": "siglip"}
_HUGGING_FACE = {
    "vision_width": "vision_config.hidden_size",
    "vision_layers": "vision_config.num_hidden_layers",
    "vision_heads": "vision_config.num_attention_heads",
    "vision_patch_size": "vision_config.patch_size",
    "image_resolution": "vision_config.image_size",
    "text_width": "text_config.hidden_size",
    "text_layers": "text_config.num_hidden_layers",
    "text_heads": "text_config.num_attention_heads",
    "context_length": "text_config.max_position_embeddings",
    "vocab_size": "text_config.vocab_size",
}
_HUGGING_FACE_ACTIVATIONS = {
    **{"quick_gelu": "quick_gelu", "gelu": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
}
# PIL's numbers of filters.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_OPEN_CLIP = {
    "embed_dim": "model_cfg.embed_dim",
    "image_resolution": "model_cfg.vision_cfg.image_size",
    "context_length": "model_cfg.text_cfg.context_length",
    "vocab_size": "model_cfg.text_cfg.vocab_size",
    "text_width": "model_cfg.text_cfg.width",
    "text_heads": "model_cfg.text_cfg.heads",
    "text_layers": "model_cfg.text_cfg.layers",
}
# Of image towers that are not timm's.
_OPEN_CLIP_VISION = {
    "vision_layers": "model_cfg.vision_cfg.layers",
    "vision_width": "model_cfg.vision_cfg.width",
    "vision_patch_size": "model_cfg.vision_cfg.patch_size",
}
_OPEN_CLIP_PIXELS = {
    "pixel_mean": "preprocess_cfg.mean",
    "pixel_std": "preprocess_cfg.std",
    "interpolation": "preprocess_cfg.interpolation",
}
# Image towers of timm: their family, and the pattern of those with the tanh form of GELU.
_TIMM = {r"vit_\w+_siglip_\d+": "siglip", r"vit_pe_core_(tiny|small|base|large)\w+": "pe"}
_TIMM_TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_\d+|vit_large\w+_512"


class Beside(NamedTuple):
    """A description beside weights: the file's name, and fields of BackboneConfig."""

    name: str
    fields: dict[str, Any]


def read_beside(path: Path) -> Beside | None:
    """The description beside a file of weights; None if there is none that says the activation.

    That of open_clip is preferred: a publisher may put both into one folder.

    Raises:
      WeightsError: a file is damaged, describes what is not supported, or another one says another
        activation.
    """
    found = []
    for name, reader in (("open_clip_config.json", _open_clip), ("config.json", _config)):
        file = path.with_name(name)
        with about(file, ":"):
            if (values := _read(file)) and (fields := reader(values, file)):
                found.append(Beside(name, fields))
    if len({beside.fields["activation"] for beside in found}) > 1:
        said = " and ".join(f"{beside.name} {beside.fields['activation']}" for beside in found)
        problem = f"the activation in {path.parent} is {said}; move one of them"
        raise WeightsError(problem, names_file=True)
    return found[0] if found else None


def unknown_model_type(path: Path) -> str:
    """What a config.json of Hugging Face says of weights that are not supported; or empty."""
    values = _read(path.with_name("config.json"))
    kind = values.raw("model_type") if values else None
    if not isinstance(kind, str) or kind in _MODEL_TYPES:
        return ""
    return f"is of the type {kind}, by the config.json beside it; {SUPPORTED}"


def _read(file: Path) -> JSONValues | None:
    content = read_json(file, is_optional=True)
    return None if content is None else JSONValues(content)


def _fields(
    values: JSONValues, places: Mapping[str, str], usual: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields at these places; absent ones have the usual value, or are left out."""
    usual = usual or {}
    present = {f: p for f, p in places.items() if f in usual or values.raw(p) is not None}
    return {f: values.get(place, _KINDS[f], usual.get(f)) for f, place in present.items()}


def _config(values: JSONValues, file: Path) -> dict[str, Any]:
    """Fields of a config.json, of Hugging Face or of ours; none if it is of something else."""
    if "vision_config" not in values.content:
        return {} if values.content.keys().isdisjoint(("family", "activation")) else _own(values)
    fields, size = _hugging_face(values), values.get("vision_config.image_size", COUNT, 224)
    for other in map(file.with_name, PREPROCESSORS):
        if (preprocessor := _read(other)) is not None:
            with about(other, ":"):
                return fields | _preprocessing(preprocessor, size)
    return fields


def _own(values: JSONValues) -> dict[str, Any]:
    """Fields with the names of BackboneConfig, and a few shorter ones.

    Unknown names are comments, unless they look like one of a field.
    """
    values.get("activation", _KINDS["activation"])
    values.check("attn_pooler_heads", 8)
    fields: dict[str, Any] = {}
    for name in values.content:
        field = _SHORT.get(name, name)
        if field in _KINDS:
            fields[field] = values.get(name, _KINDS[field])
        elif close := difflib.get_close_matches(name, [*_KINDS, *_SHORT], n=1, cutoff=0.85):
            raise WeightsError(f"{name} is unknown; did you mean {close[0]}?")
    return fields


def _of_towers(activations: list[str], epsilons: list[float]) -> dict[str, Any]:
    """Fields that both towers have: of images, then of captions."""
    if epsilons[0] != epsilons[1]:
        raise WeightsError("layer_norm_eps differs between the towers, which is not supported")
    image, text = activations
    fields = {"activation": image, "text_activation": "" if text == image else text}
    return {**fields, "layer_norm_eps": epsilons[0]}


# ---------------------------------------------------------------- Hugging Face


def _hugging_face(values: JSONValues) -> dict[str, Any]:
    """Fields of Hugging Face's config.json; what it leaves out has the library's default."""
    kind = values.get("model_type", TEXT, "")
    if kind not in _MODEL_TYPES:
        known = ", ".join(_MODEL_TYPES)
        raise WeightsError(f"model_type {kind!r} is not supported; {known} are")
    siglip = _MODEL_TYPES[kind] == "siglip"
    act, eps, heads = ("gelu_pytorch_tanh", 1e-6, 12) if siglip else ("quick_gelu", 1e-5, 8)
    activations, epsilons = [], []
    for tower in (values.group("vision_config"), values.group("text_config")):
        name = tower.get("hidden_act", TEXT, act)
        if name not in _HUGGING_FACE_ACTIVATIONS:
            raise tower.unsupported("hidden_act")
        activations.append(_HUGGING_FACE_ACTIVATIONS[name])
        epsilons.append(tower.get("layer_norm_eps", FRACTION, eps))
    fields = {
        "family": _MODEL_TYPES[kind],
        **_of_towers(activations, epsilons),
        **_fields(values, _HUGGING_FACE, {"vision_heads": 12, "text_heads": heads}),
    }
    # Written with the library's default also where the tokenizer has another.
    if siglip and fields.get("vocab_size") not in FAMILIES["siglip"].by_vocabulary:
        fields |= _fields(values, {"pad_id": "text_config.pad_token_id"})
    return fields


def _preprocessing(values: JSONValues, wanted: int) -> dict[str, Any]:
    """Fields of Hugging Face's preprocessing, which has to make images of the wanted size."""
    if values.raw("image_processor") is not None:
        values = values.group("image_processor")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        values.check(name, True)
    factor = values.content.get("rescale_factor", 1 / 255)
    if type(factor) is not float or abs(factor * 255 - 1) > 1e-3:
        raise values.unsupported("rescale_factor")
    fields: dict[str, Any] = {}
    pixels = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
    if any(values.raw(name) is not None for name in pixels.values()):
        fields = _fields(values, pixels, dict.fromkeys(pixels))
    if (resample := values.raw("resample")) is not None:
        if resample not in tuple(_RESAMPLING):
            raise values.unsupported("resample")
        fields["interpolation"] = _RESAMPLING[resample]
    if (size := values.raw("size")) is not None:
        # Early files of CLIP have a number.
        sides = size if isinstance(size, dict) else {"shortest_edge": size}
        crops = "shortest_edge" in sides
        is_cropped = values.get("do_center_crop", FLAG, crops)
        if any(side != wanted for side in sides.values()) or not sides or crops != is_cropped:
            raise values.unsupported("size")
        fields["resize"] = "crop" if crops else "squash"
    return fields


# ---------------------------------------------------------------- open_clip


def _open_clip(values: JSONValues, _: Path) -> dict[str, Any]:
    """Fields of an open_clip_config.json."""
    model, preprocess = values.group("model_cfg"), values.group("preprocess_cfg")
    vision, text = model.group("vision_cfg"), model.group("text_cfg")
    timm = vision.get("timm_model_name", TEXT, "")
    family = next((f for pattern, f in _TIMM.items() if re.fullmatch(pattern, timm)), "")
    if other := text.get("hf_model_name", TEXT, "") or ("" if family else timm):
        raise WeightsError(f"the tower {other} is not supported; {SUPPORTED}")
    siglip = family == "siglip"
    vision.check("attentional_pool", False)
    vision.check("pool_type", "tok")
    vision.check("global_average_pool", False)
    vision.check("no_ln_pre", False)
    vision.check("timm_pool", "map" if family else "")
    text.check("pool_type", "last" if siglip else "argmax")
    text.check("no_causal_mask", siglip)
    text.check("embed_cls", False)
    text.check("proj_type", "linear")
    usual = "quick_gelu" if model.get("quick_gelu", FLAG, False) and not family else "gelu"
    activations, epsilons = [], []
    for tower in (vision, text):
        details = tower.get("act_kwargs.approximate", TEXT, "none")
        if details not in ("none", "tanh") or (details == "tanh" and usual == "quick_gelu"):
            raise tower.unsupported("act_kwargs")
        activations.append("gelu_tanh" if details == "tanh" else usual)
        epsilons.append(tower.get("norm_kwargs.eps", FRACTION, 1e-5))
    required: dict[str, Any] = dict.fromkeys(_OPEN_CLIP)
    required |= {n: getattr(BackboneConfig, n) for n in ("context_length", "vocab_size")}
    fields = {"family": family or "clip", **_fields(values, _OPEN_CLIP, required)}
    if family:
        activations[0] = "gelu_tanh" if re.fullmatch(_TIMM_TANH, timm) else "gelu"
        epsilons[0] = FAMILIES[family].fields.get("layer_norm_eps", 1e-5)
        if epsilons[0] != epsilons[1]:
            raise text.unsupported("norm_kwargs")
    else:
        fields |= _fields(values, _OPEN_CLIP_VISION, dict.fromkeys(_OPEN_CLIP_VISION))
        fields["vision_heads"] = fields["vision_width"] // vision.get("head_width", COUNT, 64)
    fields |= _of_towers(activations, epsilons)
    cleaning = text.get("tokenizer_kwargs.clean", TEXT, "")
    if siglip and cleaning in TEXT_CLEANINGS:
        fields["text_cleaning"] = cleaning
    size = fields["image_resolution"]
    if preprocess.raw("size") not in (None, size, [size, size]):
        raise preprocess.unsupported("size")
    fields |= _fields(values, _OPEN_CLIP_PIXELS)
    if preprocess.raw("resize_mode") is not None:
        mode = preprocess.get("resize_mode", one_of(("shortest", "squash")))
        fields["resize"] = "crop" if mode == "shortest" else "squash"
    return fields
