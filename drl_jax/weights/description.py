"""Describes the towers in a file: what its tensors say, what lies beside it, and its release."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drl_jax.config import BackboneConfig
from drl_jax.weights.beside import read_beside
from drl_jax.weights.json_values import WeightsError
from drl_jax.weights.releases import FAMILY_FIELDS, RELEASES, SIGLIP_TEXT

# Channels of an attention head of a tower of at most this width, and the heads of wider ones and
# of So400m.
_HEAD_WIDTH, _MAX_WIDTH = 64, 1024
_HEADS_OF_WIDTH = {
    "vision": {1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16, 1792: 16},
    "text": {1152: 16, 1280: 20},
}
# Rows of the embedding of OpenAI's vocabulary.
_CLIP_VOCABULARY = 49408


# Where a release is named.
RELEASE_FLAGS = "--config.model.release=NAME of a training, --release=NAME of other commands"


class Description(NamedTuple):
    """What is known of the towers in a file.

    Attributes:
      backbone: family, sizes and everything else.
      activation_from: what says the activation, or what it is guessed from.
      is_guessed: whether nothing says it.
      licence: of the weights; empty if nothing says it.
      revision: commit of the repository that they were downloaded from; empty for another file.
    """

    backbone: BackboneConfig
    activation_from: str
    is_guessed: bool = False
    licence: str = ""
    revision: str = ""

    def __str__(self) -> str:
        backbone = self.backbone
        form = f"{backbone.resize}, {backbone.interpolation}"
        return (
            f"{backbone.family}, patches of {backbone.vision_patch_size} pixels at"
            f" {backbone.image_resolution} ({form}), captions: {backbone.text_cleaning}, activation"
            f" {backbone.activation} ({'guessed ' if self.is_guessed else ''}from"
            f" {self.activation_from}), licence: {self.licence or 'not stated by the file'}"
            f"{self.revision and f', commit {self.revision}'}"
        )


def describe(
    state: Mapping[str, np.ndarray],
    path: Path | None = None,
    *,
    release: str = "",
    likeness: str = "",
    is_openais: bool = False,
) -> Description:
    """Describes towers from a release, a description beside them, or what their tensors suggest.

    Args:
      state: tensors under OpenAI's names.
      path: of the file; None if there is none.
      release: a name of `RELEASES`; empty: none is given.
      likeness: what suggests that towers of CLIP are OpenAI's; a description or a release wins.
      is_openais: whether it proves that, as the release openai.

    Raises:
      WeightsError: the activation is unknown, descriptions disagree, or a size cannot be told.
    """
    check_release(release)
    family, sizes = _family(state), _sizes(state)
    known = {"family": family, **FAMILY_FIELDS[family]}
    source, is_guessed, licence = "its family", True, ""
    said = likeness if is_openais else f"the release {release}"
    if is_openais and release not in ("", "openai"):
        raise WeightsError(f"{path} is {likeness}, not of the release {release}; leave that out")
    release = "openai" if is_openais else release
    if family == "siglip":
        known |= SIGLIP_TEXT.get(sizes["vocab_size"], {})
    elif sizes["vocab_size"] > _CLIP_VOCABULARY:
        known["text_cleaning"] = "none"  # A multilingual vocabulary.
    if likeness and family == "clip":
        known |= RELEASES["openai"].backbone_fields(sizes["vision_patch_size"])
        source = likeness
    beside = None if path is None else read_beside(path)
    if beside is not None and (wrong := _disagreement(beside.fields, {"family": family, **sizes})):
        if not release:
            raise WeightsError(
                f"{path.parent / beside.name} describes other weights than {path.name}: {wrong};"
                f" move one of them, or name the release ({RELEASE_FLAGS})"
            )
        beside = None
    if release:
        if family != "clip":
            raise WeightsError(f"the release {release} is a CLIP, and {path} is a {family}")
        stated = RELEASES[release].backbone_fields(sizes["vision_patch_size"])
        if beside is not None and (wrong := _disagreement(beside.fields, stated)):
            raise WeightsError(
                f"{said} does not go with {path.parent / beside.name}: {wrong}; move that file"
                f"{'' if is_openais else ', or leave the release out'}"
            )
        known |= stated
        source, is_guessed = said, False
        licence = RELEASES[release].licence
    if beside is not None:
        known |= beside.fields
        source, is_guessed = beside.name, False
    if "activation" not in known:
        raise WeightsError(
            f"{path or 'the file'} does not say its activation, and neither a config.json nor an"
            f" open_clip_config.json beside it does; name the release ({RELEASE_FLAGS}), one of"
            f" {', '.join(RELEASES)}"
        )
    if family == "siglip" and "pad_id" not in known:
        raise WeightsError(
            f"{path} has {sizes['vocab_size']} tokens, which are neither SigLIP's nor SigLIP 2's;"
            ' a config.json beside it has to say "pad_id", and "text_cleaning" if captions are not'
            " just lower case"
        )
    known = {"text_cleaning": "lower", **known} if family == "siglip" else known
    known |= {**sizes, "logit_bias": "logit_bias" in state}
    for tower in ("vision", "text"):
        if f"{tower}_heads" not in known:
            known[f"{tower}_heads"] = _heads(tower, sizes[f"{tower}_width"])
    return Description(BackboneConfig(**known), source, is_guessed, licence)


def check_beside(path: Path, state: Mapping[str, np.ndarray], backbone: BackboneConfig) -> None:
    """Checks that a description beside a file that describes itself does not contradict it.

    Args:
      path: of the file.
      state: its tensors under OpenAI's names.
      backbone: what it says of itself.

    Raises:
      WeightsError: the description has the sizes of the tensors, and something else differs.
    """
    beside = read_beside(path)
    if beside is None or _disagreement(beside.fields, {"family": _family(state), **_sizes(state)}):
        return
    if wrong := _disagreement(beside.fields, dataclasses.asdict(backbone)):
        raise WeightsError(
            f"{path.parent / beside.name} contradicts what {path.name} says of itself: {wrong};"
            " move one of them"
        )


def check_release(release: str) -> None:
    """Raises WeightsError if a release has a name that is unknown; empty: none is given."""
    if release and release not in RELEASES:
        raise WeightsError(f"the release {release} is unknown; it is one of {', '.join(RELEASES)}")


def _disagreement(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first field with two values; empty if there is none."""
    for name, value in expected.items():
        if name in found and found[name] != value:
            return f"{name} is {found[name]} in one and {value} in the other"
    return ""


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
    if width in _HEADS_OF_WIDTH[tower]:
        return _HEADS_OF_WIDTH[tower][width]
    if width % _HEAD_WIDTH or width > _MAX_WIDTH:
        name = "image" if tower == "vision" else tower
        raise WeightsError(
            f"the {name} tower has {width} channels, and nothing says in how many heads; put a"
            f' config.json with "{tower}_heads" beside the file (docs/weights.md)'
        )
    return width // _HEAD_WIDTH
