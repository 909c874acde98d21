"""Descriptions of towers in JSON files beside their weights: Hugging Face's, open_clip's and ours.

Each reader returns fields of BackboneConfig. What it cannot represent, it refuses.
"""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import ACTIVATIONS, INTERPOLATIONS, RESIZES, TEXT_CLEANINGS, BackboneConfig
from drl_jax.weights.families import FAMILIES, SUPPORTED, WeightsError
from drl_jax.weights.json_values import JSONValues

# Names of Hugging Face's files with the preprocessing; newer versions of its library write the
# second one.
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
# Files that `read_beside` looks for.
DESCRIPTIONS = ("open_clip_config.json", "config.json", *_PREPROCESSORS)
_HUGGING_FACE_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
# Of Hugging Face's "model_type".
_MODEL_TYPES = {"clip": "clip", "metaclip_2": "clip", "siglip": "siglip", "siglip2": "siglip"}
# PIL's numbers of filters.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
# Image towers of timm: their family, and the pattern of those with the tanh form of GELU.
_TIMM = {r"vit_\w+_siglip_\d+": "siglip", r"vit_pe_core_(tiny|small|base|large)\w+": "pe"}
_TIMM_TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_\d+|vit_large\w+_512"
# Short names of fields in a config.json of ours.
_SHORT = {
    "mean": "pixel_mean",
    "std": "pixel_std",
    "pad": "pad_id",
    "image_size": "image_resolution",
    "patch": "vision_patch_size",
    "context": "context_length",
}
_CLIP_VOCABULARY = 49408


class Beside(NamedTuple):
    """A description beside weights.

    Attributes:
      name: of the file.
      fields: of BackboneConfig; the activation is one of them.
    """

    name: str
    fields: dict[str, Any]


def read_beside(path: Path) -> Beside | None:
    """The description beside a file of weights; None if there is none that says the activation.

    That of open_clip is preferred: a publisher may put both into one folder.

    Raises:
      WeightsError: a file is damaged, describes what is not supported, or another one says another
        activation.
    """
    found = [beside for beside in (_open_clip(path), _config(path)) if beside is not None]
    activations = [f"{beside.name} {beside.fields['activation']}" for beside in found]
    if len({beside.fields["activation"] for beside in found}) > 1:
        raise WeightsError(
            f"the activation in {path.parent} is {' and '.join(activations)}; move one of them"
        )
    return found[0] if found else None


def unknown_model_type(path: Path) -> str:
    """What a config.json of Hugging Face says of weights that are not supported; or empty."""
    values = JSONValues.read(path.with_name("config.json"))
    kind = values.content.get("model_type") if values else None
    if not isinstance(kind, str) or kind in _MODEL_TYPES:
        return ""
    return f"is of the type {kind}, by the config.json beside it; {SUPPORTED}"


def _open_clip(path: Path) -> Beside | None:
    values = JSONValues.read(path.with_name("open_clip_config.json"))
    if values is None:
        return None
    return Beside("open_clip_config.json", _open_clip_fields(values))


def _config(path: Path) -> Beside | None:
    values = JSONValues.read(path.with_name("config.json"))
    if values is None:
        return None
    if "vision_config" in values.content:
        fields = _hugging_face_fields(values)
        for name in _PREPROCESSORS:
            preprocessor = JSONValues.read(path.with_name(name))
            if preprocessor is not None:
                fields |= _preprocessor_fields(preprocessor, values)
                break
        return Beside("config.json", fields)
    is_own = not values.content.keys().isdisjoint(("family", "activation"))
    return Beside("config.json", _own_fields(values)) if is_own else None


def _own_fields(values: JSONValues) -> dict[str, Any]:
    """Fields of a config.json with the names of BackboneConfig, and a few shorter ones.

    Unknown names are comments, unless they look like one of a field.
    """
    types = {field.name: field.type for field in dataclasses.fields(BackboneConfig)}
    choices = {
        "activation": ACTIVATIONS,
        "text_activation": ACTIVATIONS,
        "resize": RESIZES,
        "interpolation": INTERPOLATIONS,
        "text_cleaning": TEXT_CLEANINGS,
    }
    values.choice("activation", ACTIVATIONS)
    fields: dict[str, Any] = {}
    for name in values.content:
        field = _SHORT.get(name, name)
        if field not in types:
            if close := difflib.get_close_matches(name, [*types, *_SHORT], n=1, cutoff=0.85):
                raise WeightsError(f"{values.path}: {name} is unknown; did you mean {close[0]}?")
        elif field in choices:
            fields[field] = values.choice(name, choices[field])
        elif field in ("pixel_mean", "pixel_std"):
            fields[field] = values.pixel(name)
        elif types[field] is bool:
            fields[field] = values.flag(name, False)
        elif types[field] is float:
            fields[field] = values.number(name, 0.0)
        elif types[field] is int:
            fields[field] = values.count(name, least=0 if field == "pad_id" else 1)
        else:
            fields[field] = values.text(name)
    if values.has("attn_pooler_heads") and values.count("attn_pooler_heads") != 8:
        raise values.unsupported("attn_pooler_heads")
    return fields


# ---------------------------------------------------------------- Hugging Face


def _hugging_face_fields(values: JSONValues) -> dict[str, Any]:
    """Fields of Hugging Face's config.json; what it leaves out has the library's default."""
    kind = values.text("model_type")
    if kind not in _MODEL_TYPES:
        raise WeightsError(
            f"{values.path}: model_type {kind!r} is not supported; {', '.join(_MODEL_TYPES)} are"
        )
    siglip = _MODEL_TYPES[kind] == "siglip"
    towers = vision, text = values.group("vision_config"), values.group("text_config")
    activations = []
    for tower in towers:
        name = tower.text("hidden_act", "gelu_pytorch_tanh" if siglip else "quick_gelu")
        if name not in _HUGGING_FACE_ACTIVATIONS:
            raise tower.unsupported("hidden_act")
        activations.append(_HUGGING_FACE_ACTIVATIONS[name])
    fields = {
        "family": _MODEL_TYPES[kind],
        **_activations(*activations),
        "layer_norm_eps": _eps(towers, "layer_norm_eps", 1e-6 if siglip else 1e-5),
        "vision_heads": vision.count("num_attention_heads", 12),
        "text_heads": text.count("num_attention_heads", 12 if siglip else 8),
    }
    stated = (
        ("vision_width", vision, "hidden_size"),
        ("vision_layers", vision, "num_hidden_layers"),
        ("vision_patch_size", vision, "patch_size"),
        ("image_resolution", vision, "image_size"),
        ("text_width", text, "hidden_size"),
        ("text_layers", text, "num_hidden_layers"),
        ("context_length", text, "max_position_embeddings"),
        ("vocab_size", text, "vocab_size"),
    )
    fields |= {field: tower.count(name) for field, tower, name in stated if tower.has(name)}
    # Written with the library's default also where the tokenizer has another.
    known = fields.get("vocab_size") in FAMILIES["siglip"].by_vocabulary
    if siglip and text.has("pad_token_id") and not known:
        fields["pad_id"] = text.count("pad_token_id", least=0)
    return fields


def _activations(vision: str, text: str) -> dict[str, str]:
    return {"activation": vision, "text_activation": "" if text == vision else text}


def _eps(towers: tuple[JSONValues, JSONValues], name: str, default: float) -> float:
    """The epsilon of both towers' LayerNorms."""
    vision, text = (tower.number(name, default) for tower in towers)
    if vision != text:
        path = towers[0].path
        raise WeightsError(f"{path}: {name} differs between the towers, which is not supported")
    return vision


def _preprocessor_fields(values: JSONValues, config: JSONValues) -> dict[str, Any]:
    """Fields of Hugging Face's preprocessing."""
    if values.has("image_processor"):
        values = values.group("image_processor")
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not values.flag(name, True):
            raise values.unsupported(name)
    factor = values.content.get("rescale_factor", 1 / 255)
    if type(factor) is not float or abs(factor * 255 - 1) > 1e-3:
        raise values.unsupported("rescale_factor")
    fields: dict[str, Any] = {}
    if values.has("image_mean") or values.has("image_std"):
        fields["pixel_mean"] = values.pixel("image_mean")
        fields["pixel_std"] = values.pixel("image_std")
    if values.has("resample"):
        if values.content["resample"] not in _RESAMPLING:
            raise values.unsupported("resample")
        fields["interpolation"] = _RESAMPLING[values.content["resample"]]
    if not values.has("size"):
        return fields
    wanted = config.group("vision_config").count("image_size", 224)
    # Early files of CLIP have a number.
    size = values.content["size"]
    sides = size if isinstance(size, dict) else {"shortest_edge": size}
    crops = "shortest_edge" in sides
    if set(sides.values()) != {wanted} or crops != values.flag("do_center_crop", crops):
        raise values.unsupported("size")
    return {**fields, "resize": "crop" if crops else "squash"}


# ---------------------------------------------------------------- open_clip


def _open_clip_fields(values: JSONValues) -> dict[str, Any]:
    """Fields of an open_clip_config.json."""
    model, preprocess = values.group("model_cfg"), values.group("preprocess_cfg")
    towers = vision, text = model.group("vision_cfg"), model.group("text_cfg")
    timm = vision.text("timm_model_name")
    family = next((f for pattern, f in _TIMM.items() if re.fullmatch(pattern, timm)), "")
    if other := text.text("hf_model_name") or ("" if family else timm):
        raise WeightsError(f"{values.path}: the tower {other} is not supported; {SUPPORTED}")
    siglip = family == "siglip"
    for tower, name, usual in (
        (vision, "attentional_pool", False),
        (vision, "pool_type", "tok"),
        (vision, "timm_pool", "map" if family else ""),
        (text, "pool_type", "last" if siglip else "argmax"),
        (text, "no_causal_mask", siglip),
        (text, "embed_cls", False),
    ):
        if tower.content.get(name, usual) != usual:
            raise tower.unsupported(name)
    usual = "quick_gelu" if model.flag("quick_gelu", False) and not family else "gelu"
    activations = []
    for tower in towers:
        details = tower.group("act_kwargs").text("approximate", "none")
        if details not in ("none", "tanh") or (details == "tanh" and usual == "quick_gelu"):
            raise tower.unsupported("act_kwargs")
        activations.append("gelu_tanh" if details == "tanh" else usual)
    fields = {
        "family": family or "clip",
        "embed_dim": model.count("embed_dim"),
        "image_resolution": vision.count("image_size"),
        "context_length": text.count("context_length", 77),
        "vocab_size": text.count("vocab_size", _CLIP_VOCABULARY),
        "text_width": text.count("width"),
        "text_heads": text.count("heads"),
        "text_layers": text.count("layers"),
    }
    if family:
        activations[0] = "gelu_tanh" if re.fullmatch(_TIMM_TANH, timm) else "gelu"
        eps = text.group("norm_kwargs").number("eps", 1e-5)
        if eps != FAMILIES[family].fields.get("layer_norm_eps", 1e-5):
            raise text.unsupported("norm_kwargs")
    else:
        eps = _eps((vision.group("norm_kwargs"), text.group("norm_kwargs")), "eps", 1e-5)
        fields["vision_layers"] = vision.count("layers")
        fields["vision_width"] = vision.count("width")
        fields["vision_heads"] = fields["vision_width"] // vision.count("head_width", 64)
        fields["vision_patch_size"] = vision.count("patch_size")
    fields |= {**_activations(*activations), "layer_norm_eps": eps}
    cleaning = text.group("tokenizer_kwargs").text("clean")
    if siglip and cleaning in TEXT_CLEANINGS:
        fields["text_cleaning"] = cleaning
    size = fields["image_resolution"]
    if preprocess.content.get("size", size) not in (size, [size, size]):
        raise preprocess.unsupported("size")
    for name, field in (("mean", "pixel_mean"), ("std", "pixel_std")):
        if preprocess.has(name):
            fields[field] = preprocess.pixel(name)
    if preprocess.has("interpolation"):
        fields["interpolation"] = preprocess.choice("interpolation", INTERPOLATIONS)
    if preprocess.has("resize_mode"):
        mode = preprocess.choice("resize_mode", ("shortest", "squash"))
        fields["resize"] = "crop" if mode == "shortest" else "squash"
    return fields
