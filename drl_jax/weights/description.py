"""Describes the towers in a file: what its tensors say, and what files beside it say."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.config import ACTIVATIONS, BackboneConfig
from drl_jax.runtime.errors import UserError
from drl_jax.weights.releases import FAMILY_FIELDS, FAMILY_LICENCES, RELEASES

# Channels of an attention head, except in widths that are listed.
_HEAD_WIDTH = 64
_HEADS_OF_WIDTH = {1152: 16, 1536: 16}
# Rows of the embedding of OpenAI's vocabulary, and of SigLIP's and SigLIP 2's.
_CLIP_VOCABULARY, _SIGLIP_VOCABULARY = 49408, 32000
# Names of activations in a config.json.
_HUGGING_FACE_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class WeightsError(UserError):
    """Weights that do not fit the model; the message names the tensors."""


class Description(NamedTuple):
    """What is known of the towers in a file.

    Attributes:
      backbone: family, sizes and everything else.
      activation_from: what says the activation.
      licence: of the weights; empty if unknown.
      revision: commit of the repository that they were downloaded from; empty for another file.
    """

    backbone: BackboneConfig
    activation_from: str
    licence: str = ""
    revision: str = ""

    def __str__(self) -> str:
        backbone = self.backbone
        return (
            f"{backbone.family}, patches of {backbone.vision_patch_size} pixels at"
            f" {backbone.image_resolution} ({backbone.resize}), activation {backbone.activation}"
            f" (from {self.activation_from}), licence: {self.licence or 'not stated by the file'}"
            f"{self.revision and f', commit {self.revision}'}"
        )


class _Beside(NamedTuple):
    """A description in a file beside the weights: its name, and fields of BackboneConfig."""

    name: str
    fields: dict[str, Any]


def describe(
    state: Mapping[str, np.ndarray],
    path: Path | None = None,
    *,
    release: str = "",
    is_openai: bool = False,
) -> Description:
    """Describes towers from their tensors, a description beside them, or a release.

    Args:
      state: tensors under OpenAI's names.
      path: of the file; None if there is none.
      release: a name of `RELEASES`; empty: none is given.
      is_openai: whether the file has the form of OpenAI's archives, or is a checkpoint of the
        PyTorch original of DRL, which knows no other towers.

    Raises:
      WeightsError: the activation is unknown, descriptions disagree, or a size cannot be told.
    """
    if release and release not in RELEASES:
        raise WeightsError(
            f"config.model.release={release} is unknown; it is one of {', '.join(RELEASES)}"
        )
    family = _family(state)
    known = {"family": family, **FAMILY_FIELDS[family]}
    sizes = _sizes(state)
    if family == "siglip":
        first = sizes["vocab_size"] == _SIGLIP_VOCABULARY
        known |= {"pad_id": int(first), "text_cleaning": "canonicalize" if first else "lower"}
    elif sizes["vocab_size"] > _CLIP_VOCABULARY:
        known["text_cleaning"] = "none"  # A multilingual vocabulary.
    known["logit_bias"] = "logit_bias" in state
    beside = None if path is None or is_openai else _read_beside(path)
    if beside is not None and (wrong := _disagreement(beside.fields, {"family": family, **sizes})):
        if not release:
            raise WeightsError(
                f"{path.parent / beside.name} describes other weights than {path.name}: {wrong};"
                " move one of them, or name the release: --config.model.release=NAME"
            )
        beside = None
    source, licence = "its family", FAMILY_LICENCES.get(family, "")
    if is_openai:
        release = release or "openai"
    if release:
        if family != "clip":
            raise WeightsError(f"config.model.release={release} is a CLIP; {path} is a {family}")
        found = RELEASES[release]
        stated = found.backbone_fields(sizes["vision_patch_size"])
        if beside is not None and (wrong := _disagreement(beside.fields, stated)):
            raise WeightsError(
                f"config.model.release={release} does not go with {path.parent / beside.name}:"
                f" {wrong}; leave config.model.release out, or move the file"
            )
        known |= stated
        source, licence = f"the release {release}", found.licence
    if beside is not None:
        known |= beside.fields
        source = beside.name
    if "activation" not in known:
        raise WeightsError(
            f"{path or 'the file'} does not say its activation, and neither a config.json nor an"
            " open_clip_config.json beside it does; name the release with"
            f" --config.model.release=NAME, one of {', '.join(RELEASES)}"
        )
    known |= sizes
    for tower in ("vision", "text"):
        if f"{tower}_heads" not in known:
            known[f"{tower}_heads"] = _heads(tower, sizes[f"{tower}_width"])
    return Description(BackboneConfig(**known), source, licence)


# ---------------------------------------------------------------- tensors


def _family(state: Mapping[str, np.ndarray]) -> str:
    if "visual.attn_pool.probe" not in state:
        return "clip"
    return "siglip" if "text_projection.weight" in state else "pe"


def _sizes(state: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The sizes of BackboneConfig that the shapes of tensors say."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in state:
            raise WeightsError(f"the weights lack {name}")
        if state[name].ndim != axes:
            raise WeightsError(f"{name} has {state[name].ndim} axes, not {axes}")
        return state[name].shape

    def layers(prefix: str) -> int:
        start = f"{prefix}.resblocks."
        return len({n[len(start) :].split(".")[0] for n in state if n.startswith(start)})

    def hidden(prefix: str, width: int) -> int:
        rows = shape(f"{prefix}.resblocks.0.mlp.c_fc.bias", 1)[0]
        return 0 if rows == 4 * width else rows

    vision_width, _, patch, _ = shape("visual.conv1.weight", 4)
    patches = shape("visual.positional_embedding", 2)[0] - ("visual.class_embedding" in state)
    text_width = shape("ln_final.weight", 1)[0]
    if "text_projection.weight" in state:
        embed_dim = shape("text_projection.weight", 2)[0]
    else:
        embed_dim = shape("text_projection", 2)[1]
    return {
        "embed_dim": embed_dim,
        "image_resolution": round(patches**0.5) * patch,
        "vision_layers": layers("visual.transformer"),
        "vision_width": vision_width,
        "vision_patch_size": patch,
        "vision_mlp_width": hidden("visual.transformer", vision_width),
        "context_length": shape("positional_embedding", 2)[0],
        "vocab_size": shape("token_embedding.weight", 2)[0],
        "text_width": text_width,
        "text_layers": layers("transformer"),
        "text_mlp_width": hidden("transformer", text_width),
    }


def _heads(tower: str, width: int) -> int:
    if width in _HEADS_OF_WIDTH:
        return _HEADS_OF_WIDTH[width]
    if width % _HEAD_WIDTH:
        name = "image" if tower == "vision" else tower
        raise WeightsError(
            f"the {name} tower has {width} channels, which are not heads of {_HEAD_WIDTH} as in"
            " published towers, and no config.json beside the file says how many heads there are;"
            " export a run again with: python -m drl_jax.convert RUN FILE.safetensors"
        )
    return width // _HEAD_WIDTH


# ---------------------------------------------------------------- files beside the weights


def _read_beside(path: Path) -> _Beside | None:
    """The description beside a file of weights, with the preprocessing of Hugging Face's."""
    for name, read in (("open_clip_config.json", _open_clip_fields), ("config.json", _fields)):
        values = _read_json(path.with_name(name))
        if values is None:
            continue
        try:
            fields = read(values)
            if name == "config.json":
                fields |= _preprocessor_fields(
                    _read_json(path.with_name("preprocessor_config.json")) or {}
                )
        except WeightsError as error:
            raise WeightsError(f"{path.with_name(name)}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise WeightsError(f"{path.with_name(name)} cannot be used: {error!r}") from error
        if "activation" in fields:
            return _Beside(name, fields)
    return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is damaged: it is not JSON; get it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{path} describes no model: it is not a JSON object")
    return values


def _disagreement(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first field with two values; empty if there is none."""
    for name, value in expected.items():
        if name in found and found[name] != value:
            return f"{name} is {found[name]} in one and {value} in the other"
    return ""


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config.json: Hugging Face's, or one with the names of BackboneConfig."""
    if "vision_config" in values:
        return _hugging_face_fields(values)
    if "family" not in values:
        return {}
    short = {"mean": "pixel_mean", "std": "pixel_std", "pad": "pad_id"}
    short |= {"image_size": "image_resolution", "patch": "vision_patch_size"}
    short |= {"context": "context_length"}
    named = {short.get(name, name): value for name, value in values.items()}
    known = {field.name for field in dataclasses.fields(BackboneConfig)}
    fields = {name: value for name, value in named.items() if name in known}
    if fields.get("activation") not in ACTIVATIONS:
        raise WeightsError(f"activation is one of {', '.join(ACTIVATIONS)}")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}


def _hugging_face_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Hugging Face's config.json; what it leaves out has the library's default."""
    kind = values.get("model_type")
    if kind not in ("clip", "siglip", "siglip2", "metaclip_2"):
        raise WeightsError(
            f"model_type {kind!r} is not supported; clip, siglip, siglip2 and metaclip_2 are"
        )
    siglip = kind.startswith("siglip")
    vision, text = values["vision_config"], values.get("text_config") or {}
    default = "gelu_pytorch_tanh" if siglip else "quick_gelu"
    activations = {tower.get("hidden_act", default) for tower in (vision, text)}
    if len(activations) > 1 or not activations <= _HUGGING_FACE_ACTIVATIONS.keys():
        raise WeightsError(f"hidden_act {', '.join(sorted(map(str, activations)))} is unsupported")
    default_eps = 1e-6 if siglip else 1e-5
    eps = {tower.get("layer_norm_eps", default_eps) for tower in (vision, text)}
    if len(eps) > 1:
        raise WeightsError("layer_norm_eps differs between the towers, which is unsupported")
    fields = {
        "family": "siglip" if siglip else "clip",
        "activation": _HUGGING_FACE_ACTIVATIONS[activations.pop()],
        "layer_norm_eps": eps.pop(),
        "vision_heads": vision.get("num_attention_heads", 12),
        "text_heads": text.get("num_attention_heads", 12 if siglip else 8),
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
    return fields | {field: tower[name] for field, tower, name in stated if name in tower}


def _preprocessor_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Hugging Face's preprocessor_config.json."""
    fields: dict[str, Any] = {}
    if "image_mean" in values and "image_std" in values:
        fields["pixel_mean"] = tuple(map(float, values["image_mean"]))
        fields["pixel_std"] = tuple(map(float, values["image_std"]))
    if "resample" in values:
        fields["interpolation"] = {2: "bilinear", 3: "bicubic"}[values["resample"]]
    size = values.get("size")
    if isinstance(size, dict):
        crops = "shortest_edge" in size or bool(values.get("do_center_crop"))
        fields["resize"] = "crop" if crops else "squash"
    return fields


def _open_clip_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an open_clip_config.json."""
    model, preprocess = values["model_cfg"], values.get("preprocess_cfg") or {}
    vision, text = model["vision_cfg"], model["text_cfg"]
    if name := vision.get("timm_model_name") or text.get("hf_model_name"):
        raise WeightsError(
            f"{name} is open_clip's form of another library's tower; use its publisher's own file"
        )
    for tower, key, usual in (
        (vision, "attentional_pool", False),
        (vision, "pool_type", "tok"),
        (text, "pool_type", "argmax"),
        (text, "no_causal_mask", False),
        (text, "embed_cls", False),
    ):
        if tower.get(key, usual) != usual:
            raise WeightsError(f"{key}={tower[key]} is unsupported")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    if any(
        (tower.get("act_kwargs") or {}).get("approximate") == "tanh" for tower in (vision, text)
    ):
        activation = "gelu_tanh"
    heads = vision["width"] // vision.get("head_width", _HEAD_WIDTH)
    fields = {
        "family": "clip",
        "activation": activation,
        "embed_dim": model["embed_dim"],
        "image_resolution": vision["image_size"],
        "vision_layers": vision["layers"],
        "vision_width": vision["width"],
        "vision_heads": heads,
        "vision_patch_size": vision["patch_size"],
        "context_length": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", _CLIP_VOCABULARY),
        "text_width": text["width"],
        "text_heads": text["heads"],
        "text_layers": text["layers"],
    }
    for name, field in (("mean", "pixel_mean"), ("std", "pixel_std")):
        if name in preprocess:
            fields[field] = tuple(map(float, preprocess[name]))
    if preprocess.get("interpolation") in ("bilinear", "bicubic"):
        fields["interpolation"] = preprocess["interpolation"]
    if "resize_mode" in preprocess:
        fields["resize"] = {"shortest": "crop", "squash": "squash"}[preprocess["resize_mode"]]
    return fields
