"""Descriptions of towers in JSON files beside their weights: Hugging Face's, open_clip's and ours.

Each reader returns fields of BackboneConfig. What it cannot represent, it refuses.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from drl_jax.config import TEXT_CLEANINGS, BackboneConfig, ConfigError, checked_backbone_field
from drl_jax.weights.errors import WeightsError, about, read_json
from drl_jax.weights.families import FAMILIES, SUPPORTED
from drl_jax.weights.source import PREPROCESSORS


class _Values:
    """A JSON object of a file; null is the same as an absent value.

    A dot in a name leads into an object inside it.
    """

    def __init__(self, file: Path):
        self.content = read_json(file, is_optional=True)

    def raw(self, name: str, default: Any = None) -> Any:
        """A value of any type; the default if it is absent."""
        value: Any = self.content
        for part in name.split("."):
            if not isinstance(value, dict):
                raise WeightsError(f"{name} is inside of {value!r}, which is no group of fields")
            if (value := value.get(part)) is None:
                return default
        return value

    def choice(self, name: str, choices: Collection, default: Any = None) -> Any:
        """One of some values of one type."""
        value = self.raw(name, default)
        if type(value) is not type(next(iter(choices))) or value not in choices:
            names = ", ".join(map(str, choices)).lower()
            raise WeightsError(f"{name} is {value!r}, not one of {names}")
        return value

    def field(self, field: str, name: str, default: Any = None) -> Any:
        """A value that a field of BackboneConfig can have."""
        try:
            return checked_backbone_field(field, self.raw(name, default), name)
        except ConfigError as error:
            raise WeightsError(str(error)) from error

    def fields(self, group: str, *, required: bool = False, **places: str) -> dict[str, Any]:
        """Fields of BackboneConfig by their places in a group: those that are there, or all."""
        return {
            field: self.field(field, group + place)
            for field, place in places.items()
            if required or self.raw(group + place) is not None
        }

    def check(self, group: str, **supported: Any) -> None:
        """Raises WeightsError unless these values are absent, or those that are supported."""
        for name, value in supported.items():
            if self.raw(group + name) not in (None, value):
                raise self.unsupported(group + name)

    def unsupported(self, name: str) -> WeightsError:
        return WeightsError(f"{name}={self.raw(name)!r} is not supported")


# Short names of fields in a config.json of ours.
_SHORT = {
    **{"mean": "pixel_mean", "std": "pixel_std", "pad": "pad_id", "patch": "vision_patch_size"},
    **{"image_size": "image_resolution", "context": "context_length"},
}
# Of Hugging Face's "model_type".
_MODEL_TYPES = {"clip": "clip", "metaclip_2": "clip", "siglip": "siglip", "siglip2": "siglip"}
_HUGGING_FACE_ACTIVATIONS = {
    **{"quick_gelu": "quick_gelu", "gelu": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
}
_SIZES = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
# PIL's numbers of filters.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_RESIZES = {"shortest": "crop", "squash": "squash"}  # of open_clip
# Image towers of timm: their family, and the pattern of those with the tanh form of GELU.
_TIMM = {r"vit_\w+_siglip_\d+": "siglip", r"vit_pe_core_(tiny|small|base|large)\w+": "pe"}
_TIMM_TANH = r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_\d+|vit_large\w+_512"


def read_beside(path: Path) -> tuple[Path, dict[str, Any]]:
    """The description beside a file of weights, and its fields; none without the activation.

    WeightsError: a file is damaged, or describes what is not supported, or two disagree.
    """
    found: dict[Path, dict[str, Any]] = {}
    # That of open_clip is preferred: a publisher may put both into one folder.
    for name, reader in (("open_clip_config.json", _open_clip), ("config.json", _config)):
        file = path.with_name(name)
        with about(file, ":"):
            if (values := _Values(file)).content and (fields := reader(values, file)):
                found[file] = fields
    said = [f"{file.name} {fields['activation']}" for file, fields in found.items()]
    if len({fields["activation"] for fields in found.values()}) > 1:
        raise WeightsError(f"has two activations beside it: {' and '.join(said)}; move one of them")
    return next(iter(found.items()), (path, {}))


def unknown_model_type(path: Path) -> str:
    """What a config.json of Hugging Face says of weights that are not supported; or empty."""
    kind = _Values(path.with_name("config.json")).raw("model_type")
    if not isinstance(kind, str) or kind in _MODEL_TYPES:
        return ""
    return f"is of the type {kind}, by the config.json beside it; {SUPPORTED}"


def _config(values: _Values, file: Path) -> dict[str, Any]:
    """Fields of a config.json, of Hugging Face or of ours; none if it is of something else."""
    if "vision_config" not in values.content:
        return {} if values.content.keys().isdisjoint(("family", "activation")) else _own(values)
    fields = _hugging_face(values)
    for other in map(file.with_name, PREPROCESSORS):
        with about(other, ":"):
            if (preprocessor := _Values(other)).content:
                size = values.raw("vision_config.image_size", 224)
                return fields | _preprocessing(preprocessor, size)
    return fields


def _own(values: _Values) -> dict[str, Any]:
    """Fields with the names of BackboneConfig, and a few shorter ones; other names are comments."""
    values.field("activation", "activation")
    values.check("", attn_pooler_heads=8)
    known = [field.name for field in dataclasses.fields(BackboneConfig)]
    places = {_SHORT.get(name, name): name for name in values.content}
    for name in (name for field, name in places.items() if field not in known):
        if close := difflib.get_close_matches(name, [*known, *_SHORT], n=1, cutoff=0.85):
            raise WeightsError(f"{name} is unknown; did you mean {close[0]}?")
    return values.fields("", **{f: name for f, name in places.items() if f in known})


def _of_towers(activations: list[str], epsilons: list[float]) -> dict[str, Any]:
    (image, text), (eps, other) = activations, epsilons
    if eps != other:
        raise WeightsError("layer_norm_eps differs between the towers, which is not supported")
    text = "" if text == image else text
    return {"activation": image, "text_activation": text, "layer_norm_eps": eps}


def _hugging_face(values: _Values) -> dict[str, Any]:
    """Fields of Hugging Face's config.json; what it leaves out has the library's default."""
    family = _MODEL_TYPES[values.choice("model_type", _MODEL_TYPES)]
    siglip = family == "siglip"
    usual, eps, heads = ("gelu_pytorch_tanh", 1e-6, 12) if siglip else ("quick_gelu", 1e-5, 8)
    fields = {"family": family, "vision_heads": 12, "text_heads": heads}
    activations, epsilons = [], []
    for tower in ("vision", "text"):
        at = f"{tower}_config."
        name = values.choice(f"{at}hidden_act", _HUGGING_FACE_ACTIVATIONS, usual)
        activations.append(_HUGGING_FACE_ACTIVATIONS[name])
        epsilons.append(values.field("layer_norm_eps", f"{at}layer_norm_eps", eps))
        for size, place in _SIZES.items():
            fields |= values.fields(at, **{f"{tower}_{size}": place})
    places = {"vision_patch_size": "patch_size", "image_resolution": "image_size"}
    fields |= values.fields("vision_config.", **places)
    places = {"vocab_size": "vocab_size", "context_length": "max_position_embeddings"}
    # Written with the library's default also where the tokenizer has another.
    if siglip and values.raw("text_config.vocab_size") not in FAMILIES["siglip"].by_vocabulary:
        places["pad_id"] = "pad_token_id"
    return fields | values.fields("text_config.", **places) | _of_towers(activations, epsilons)


def _preprocessing(values: _Values, wanted: int) -> dict[str, Any]:
    """Fields of Hugging Face's preprocessing, which has to make images of the wanted size."""
    at = "" if values.raw("image_processor") is None else "image_processor."
    values.check(at, do_resize=True, do_rescale=True, do_normalize=True)
    factor = values.raw(f"{at}rescale_factor")
    if factor is not None and not (type(factor) is float and abs(factor * 255 - 1) <= 1e-3):
        raise values.unsupported(f"{at}rescale_factor")
    pixels = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
    fields = values.fields(at, **pixels) and values.fields(at, required=True, **pixels)
    if values.raw(f"{at}resample") is not None:
        fields["interpolation"] = _RESAMPLING[values.choice(f"{at}resample", _RESAMPLING)]
    if (size := values.raw(f"{at}size")) is not None:
        # Early files of CLIP have a number.
        sides = size if isinstance(size, dict) else {"shortest_edge": size}
        crops = "shortest_edge" in sides
        is_cropped = values.choice(f"{at}do_center_crop", (False, True), crops)
        if any(side != wanted for side in sides.values()) or not sides or crops != is_cropped:
            raise values.unsupported(f"{at}size")
        fields["resize"] = "crop" if crops else "squash"
    return fields


def _open_clip(values: _Values, _: Path) -> dict[str, Any]:
    """Fields of an open_clip_config.json."""
    vision, text, preprocess = "model_cfg.vision_cfg.", "model_cfg.text_cfg.", "preprocess_cfg."
    timm = str(values.raw(f"{vision}timm_model_name") or "")
    family = next((f for pattern, f in _TIMM.items() if re.fullmatch(pattern, timm)), "clip")
    siglip, is_clip = family == "siglip", family == "clip"
    if other := values.raw(f"{text}hf_model_name") or (timm if is_clip else ""):
        raise WeightsError(f"the tower {other} is not supported; {SUPPORTED}")
    values.check(vision, attentional_pool=False, pool_type="tok", global_average_pool=False)
    values.check(vision, no_ln_pre=False, timm_pool="" if is_clip else "map")
    values.check(text, pool_type="last" if siglip else "argmax", no_causal_mask=siglip)
    values.check(text, embed_cls=False, proj_type="linear")
    quick = values.choice("model_cfg.quick_gelu", (False, True), False) and is_clip
    activations, epsilons = [], []
    forms = {"none": "quick_gelu"} if quick else {"none": "gelu", "tanh": "gelu_tanh"}
    for tower in (vision, text):
        form = values.choice(f"{tower}act_kwargs.approximate", forms, "none")
        activations.append(forms[form])
        epsilons.append(values.field("layer_norm_eps", f"{tower}norm_kwargs.eps", 1e-5))
    sizes = {"text_width": "width", "text_heads": "heads", "text_layers": "layers"}
    pixels = {"pixel_mean": "mean", "pixel_std": "std", "interpolation": "interpolation"}
    usual = {name: getattr(BackboneConfig, name) for name in ("context_length", "vocab_size")}
    fields = {
        "family": family,
        **values.fields("model_cfg.", required=True, embed_dim="embed_dim"),
        **values.fields(vision, required=True, image_resolution="image_size"),
        **values.fields(text, required=True, **sizes),
        **{**usual, **values.fields(text, **{name: name for name in usual})},
        **values.fields(preprocess, **pixels),
    }
    if is_clip:
        sizes = {"vision_layers": "layers", "vision_width": "width"}
        fields |= values.fields(vision, required=True, **sizes, vision_patch_size="patch_size")
        of_head = values.field("vision_width", f"{vision}head_width", 64)
        fields["vision_heads"] = fields["vision_width"] // of_head
    else:
        activations[0] = "gelu_tanh" if re.fullmatch(_TIMM_TANH, timm) else "gelu"
        epsilons[0] = FAMILIES[family].fields.get("layer_norm_eps", 1e-5)
    fields |= _of_towers(activations, epsilons)
    if siglip and (cleaning := values.raw(f"{text}tokenizer_kwargs.clean")) in TEXT_CLEANINGS:
        fields["text_cleaning"] = cleaning
    size = fields["image_resolution"]
    if values.raw(f"{preprocess}size") not in (None, size, [size, size]):
        raise values.unsupported(f"{preprocess}size")
    if values.raw(f"{preprocess}resize_mode") is not None:
        fields["resize"] = _RESIZES[values.choice(f"{preprocess}resize_mode", _RESIZES)]
    return fields
