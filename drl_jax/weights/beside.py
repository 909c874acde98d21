"""Descriptions of towers in JSON files beside their weights: Hugging Face's, open_clip's and ours.

Each reader returns fields of BackboneConfig. What it cannot represent, it refuses.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import ACTIVATIONS, INTERPOLATIONS, RESIZES, TEXT_CLEANINGS, BackboneConfig
from drl_jax.weights.errors import WeightsError, about, read_json
from drl_jax.weights.families import FAMILIES, SUPPORTED
from drl_jax.weights.source import PREPROCESSORS

# ---------------------------------------------------------------- values in JSON files


class _Kind(NamedTuple):
    """What a field may hold, in code and in words."""

    accepts: Callable[[Any], bool]
    expected: str


def _whole(least: int) -> _Kind:
    expected = f"a whole number of at least {least}"
    return _Kind(lambda value: type(value) is int and least <= value < 2**31, expected)


def _one_of(choices: tuple[str, ...]) -> _Kind:
    return _Kind(lambda value: value in choices, f"one of {', '.join(choices)}")


def _is_rgb(value: Any) -> bool:
    numbers = value if isinstance(value, list) else []
    return len(numbers) == 3 and all(type(v) in (int, float) and abs(v) <= 1 for v in numbers)


_COUNT, _RGB = _whole(1), _Kind(_is_rgb, "three numbers between -1 and 1")
_FRACTION = _Kind(lambda value: type(value) is float and 0 < value < 1, "a number between 0 and 1")
_FLAG = _Kind(lambda value: type(value) is bool, "true or false")
_TEXT = _Kind(lambda value: type(value) is str, "a text")
_GROUP = _Kind(lambda value: isinstance(value, dict), "a group of fields")
# What a field of BackboneConfig may hold.
_OF_TYPE = {bool: _FLAG, int: _COUNT, float: _FRACTION, str: _TEXT}
_KINDS = {
    **{f.name: _OF_TYPE.get(f.type, _RGB) for f in dataclasses.fields(BackboneConfig)},
    **dict.fromkeys(("activation", "text_activation"), _one_of(ACTIVATIONS)),
    **{"resize": _one_of(RESIZES), "interpolation": _one_of(INTERPOLATIONS)},
    **{"text_cleaning": _one_of(TEXT_CLEANINGS), "pad_id": _whole(0)},
}


class _Values:
    """A JSON object of a file, or one inside it; null is the same as an absent field.

    Names may have dots, for fields of objects inside this one.
    """

    def __init__(self, content: Mapping[str, Any], prefix: str = ""):
        self.content, self._prefix = content, prefix

    def group(self, name: str) -> "_Values":
        """An object inside this one; an empty one if it is absent."""
        return _Values(self.get(name, _GROUP, {}), f"{self._prefix}{name}.")

    def raw(self, name: str) -> Any:
        """A value of any type; None if it is absent."""
        group, dot, rest = name.partition(".")
        return self.group(group).raw(rest) if dot else self.content.get(name)

    def get(self, name: str, kind: _Kind, default: Any = None) -> Any:
        """A value of a kind; WeightsError: it is of another one, or absent and has no default."""
        value = self.raw(name)
        value = default if value is None else value
        if not kind.accepts(value):
            raise WeightsError(f"{self._prefix}{name} is {value!r}, not {kind.expected}")
        return tuple(map(float, value)) if kind is _RGB else value

    def check(self, **supported: Any) -> None:
        """Raises WeightsError unless these values are absent, or those that are supported."""
        for name, value in supported.items():
            if self.raw(name) not in (None, value):
                raise self.unsupported(name)

    def unsupported(self, name: str) -> WeightsError:
        return WeightsError(f"{self._prefix}{name}={self.raw(name)!r} is not supported")

    def required(self, **places: str) -> dict[str, Any]:
        """Fields of BackboneConfig by their names here; WeightsError: one is absent or wrong."""
        return {field: self.get(place, _KINDS[field]) for field, place in places.items()}

    def fields(self, **places: str) -> dict[str, Any]:
        """The same of those that are present."""
        present = {f: place for f, place in places.items() if self.raw(place) is not None}
        return self.required(**present)


# ---------------------------------------------------------------- descriptions

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
# PIL's numbers of filters.
_RESAMPLING = {2: "bilinear", 3: "bicubic"}
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


def _read(file: Path) -> _Values | None:
    content = read_json(file, is_optional=True)
    return None if content is None else _Values(content)


def _config(values: _Values, file: Path) -> dict[str, Any]:
    """Fields of a config.json, of Hugging Face or of ours; none if it is of something else."""
    if "vision_config" not in values.content:
        return {} if values.content.keys().isdisjoint(("family", "activation")) else _own(values)
    fields, size = _hugging_face(values), values.get("vision_config.image_size", _COUNT, 224)
    for other in map(file.with_name, PREPROCESSORS):
        if (preprocessor := _read(other)) is not None:
            with about(other, ":"):
                return fields | _preprocessing(preprocessor, size)
    return fields


def _own(values: _Values) -> dict[str, Any]:
    """Fields with the names of BackboneConfig, and a few shorter ones.

    Unknown names are comments, unless they look like one of a field.
    """
    values.get("activation", _KINDS["activation"])
    values.check(attn_pooler_heads=8)
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


def _hugging_face(values: _Values) -> dict[str, Any]:
    """Fields of Hugging Face's config.json; what it leaves out has the library's default."""
    kind = values.get("model_type", _TEXT, "")
    if kind not in _MODEL_TYPES:
        known = ", ".join(_MODEL_TYPES)
        raise WeightsError(f"model_type {kind!r} is not supported; {known} are")
    vision, text = values.group("vision_config"), values.group("text_config")
    siglip = _MODEL_TYPES[kind] == "siglip"
    usual, eps, heads = ("gelu_pytorch_tanh", 1e-6, 12) if siglip else ("quick_gelu", 1e-5, 8)
    activations, epsilons = [], []
    for tower in (vision, text):
        name = tower.get("hidden_act", _TEXT, usual)
        if name not in _HUGGING_FACE_ACTIVATIONS:
            raise tower.unsupported("hidden_act")
        activations.append(_HUGGING_FACE_ACTIVATIONS[name])
        epsilons.append(tower.get("layer_norm_eps", _FRACTION, eps))
    fields = {
        **{"family": _MODEL_TYPES[kind], "vision_heads": 12, "text_heads": heads},
        **_of_towers(activations, epsilons),
        **vision.fields(vision_width="hidden_size", vision_layers="num_hidden_layers"),
        **vision.fields(vision_heads="num_attention_heads", vision_patch_size="patch_size"),
        **vision.fields(image_resolution="image_size"),
        **text.fields(text_width="hidden_size", text_layers="num_hidden_layers"),
        **text.fields(text_heads="num_attention_heads", vocab_size="vocab_size"),
        **text.fields(context_length="max_position_embeddings"),
    }
    # Written with the library's default also where the tokenizer has another.
    if siglip and fields.get("vocab_size") not in FAMILIES["siglip"].by_vocabulary:
        fields |= text.fields(pad_id="pad_token_id")
    return fields


def _preprocessing(values: _Values, wanted: int) -> dict[str, Any]:
    """Fields of Hugging Face's preprocessing, which has to make images of the wanted size."""
    if values.raw("image_processor") is not None:
        values = values.group("image_processor")
    values.check(do_resize=True, do_rescale=True, do_normalize=True)
    factor = values.content.get("rescale_factor", 1 / 255)
    if type(factor) is not float or abs(factor * 255 - 1) > 1e-3:
        raise values.unsupported("rescale_factor")
    pixels = {"pixel_mean": "image_mean", "pixel_std": "image_std"}
    fields = values.required(**pixels) if values.fields(**pixels) else {}
    if (resample := values.raw("resample")) is not None:
        if resample not in tuple(_RESAMPLING):
            raise values.unsupported("resample")
        fields["interpolation"] = _RESAMPLING[resample]
    if (size := values.raw("size")) is not None:
        # Early files of CLIP have a number.
        sides = size if isinstance(size, dict) else {"shortest_edge": size}
        crops = "shortest_edge" in sides
        is_cropped = values.get("do_center_crop", _FLAG, crops)
        if any(side != wanted for side in sides.values()) or not sides or crops != is_cropped:
            raise values.unsupported("size")
        fields["resize"] = "crop" if crops else "squash"
    return fields


# ---------------------------------------------------------------- open_clip


def _open_clip(values: _Values, _: Path) -> dict[str, Any]:
    """Fields of an open_clip_config.json."""
    model, preprocess = values.group("model_cfg"), values.group("preprocess_cfg")
    vision, text = model.group("vision_cfg"), model.group("text_cfg")
    timm = vision.get("timm_model_name", _TEXT, "")
    family = next((f for pattern, f in _TIMM.items() if re.fullmatch(pattern, timm)), "")
    if other := text.get("hf_model_name", _TEXT, "") or ("" if family else timm):
        raise WeightsError(f"the tower {other} is not supported; {SUPPORTED}")
    siglip = family == "siglip"
    vision.check(attentional_pool=False, pool_type="tok", global_average_pool=False)
    vision.check(no_ln_pre=False, timm_pool="map" if family else "")
    text.check(pool_type="last" if siglip else "argmax", no_causal_mask=siglip)
    text.check(embed_cls=False, proj_type="linear")
    usual = "quick_gelu" if model.get("quick_gelu", _FLAG, False) and not family else "gelu"
    activations, epsilons = [], []
    for tower in (vision, text):
        details = tower.get("act_kwargs.approximate", _TEXT, "none")
        if details not in ("none", "tanh") or (details == "tanh" and usual == "quick_gelu"):
            raise tower.unsupported("act_kwargs")
        activations.append("gelu_tanh" if details == "tanh" else usual)
        epsilons.append(tower.get("norm_kwargs.eps", _FRACTION, 1e-5))
    fields = {
        **{"family": family or "clip", **model.required(embed_dim="embed_dim")},
        **vision.required(image_resolution="image_size"),
        **text.required(text_width="width", text_heads="heads", text_layers="layers"),
        **{name: getattr(BackboneConfig, name) for name in ("context_length", "vocab_size")},
        **text.fields(context_length="context_length", vocab_size="vocab_size"),
        **preprocess.fields(pixel_mean="mean", pixel_std="std", interpolation="interpolation"),
    }
    if family:
        activations[0] = "gelu_tanh" if re.fullmatch(_TIMM_TANH, timm) else "gelu"
        epsilons[0] = FAMILIES[family].fields.get("layer_norm_eps", 1e-5)
        if epsilons[0] != epsilons[1]:
            raise text.unsupported("norm_kwargs")
    else:
        sizes = {"vision_layers": "layers", "vision_width": "width"}
        fields |= vision.required(**sizes, vision_patch_size="patch_size")
        fields["vision_heads"] = fields["vision_width"] // vision.get("head_width", _COUNT, 64)
    fields |= _of_towers(activations, epsilons)
    cleaning = text.get("tokenizer_kwargs.clean", _TEXT, "")
    if siglip and cleaning in TEXT_CLEANINGS:
        fields["text_cleaning"] = cleaning
    size = fields["image_resolution"]
    if preprocess.raw("size") not in (None, size, [size, size]):
        raise preprocess.unsupported("size")
    if preprocess.raw("resize_mode") is not None:
        mode = preprocess.get("resize_mode", _one_of(("shortest", "squash")))
        fields["resize"] = "crop" if mode == "shortest" else "squash"
    return fields
