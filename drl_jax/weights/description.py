"""Describes the towers in a file: what its tensors say, what lies beside it, and its release."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import BackboneConfig
from drl_jax.hub.releases import RELEASES
from drl_jax.weights.beside import Beside, read_beside
from drl_jax.weights.errors import WeightsError
from drl_jax.weights.families import FAMILIES, sizes_of
from drl_jax.weights.tensors import StateDict

# Channels of an attention head of a tower of at most this width, and the heads of wider ones and
# of So400m.
_HEAD_WIDTH, _MAX_WIDTH = 64, 1024
_HEADS_OF_WIDTH = {
    "vision": {1152: 16, 1280: 16, 1408: 16, 1536: 16, 1664: 16, 1792: 16},
    "text": {1152: 16, 1280: 20},
}
UNSTATED = "does not say its activation"
# Where a release is named.
RELEASE_FLAGS = "config.model.release=NAME of a training, or release=NAME"


class Description(NamedTuple):
    """What is known of the towers in a file; a text is empty if nothing says it."""

    backbone: BackboneConfig
    activation_from: str  # what says the activation, or what it is guessed from
    is_guessed: bool = False  # whether nothing says it
    licence: str = ""  # of the weights
    revision: str = ""  # commit of the repository that they were downloaded from
    names: str = ""  # whose names the tensors have in the file, and their prefix
    notes: tuple[str, ...] = ()  # on what else is in the file

    def __str__(self) -> str:
        backbone = self.backbone
        form = f"{backbone.resize}, {backbone.interpolation}"
        return (
            f"{backbone.family}, patches of {backbone.vision_patch_size} pixels at"
            f" {backbone.image_resolution} ({form}), captions: {backbone.text_cleaning}, activation"
            f" {backbone.activation} ({'guessed ' if self.is_guessed else ''}from"
            f" {self.activation_from}), licence: {self.licence or 'not stated by the file'}"
            f"{self.revision and f', commit {self.revision}'}"
            + "".join(f"; {note}" for note in self.notes)
        )


def describe(
    family: str, state: StateDict, path: Path | None = None, release: str = "", evidence: str = ""
) -> Description:
    """Describes towers from a release, a description beside them, or what their tensors suggest.

    `state` has OpenAI's names. `evidence` is what proves the release, if nobody named it; without a
    release, what suggests that a CLIP is OpenAI's, unless a description says something else.

    Raises:
      WeightsError: the activation is unknown, descriptions disagree, or a size cannot be told.
    """
    row, sizes = FAMILIES[family], sizes_of(state)
    known = {"family": family, **row.fields, **row.by_vocabulary.get(sizes["vocab_size"], {})}
    source, is_guessed, licence = "its family", True, ""
    if not row.by_vocabulary and sizes["vocab_size"] > BackboneConfig.vocab_size:
        known["text_cleaning"] = "none"  # A multilingual vocabulary.
    beside, is_of_others = _read_beside(path, family, sizes)
    if is_of_others and not release:
        raise WeightsError(
            f"{path.with_name(beside.name)} describes other weights than {path.name}:"
            f" {is_of_others}; move one of them, or name the release ({RELEASE_FLAGS})",
            names_file=True,
        )
    beside = None if is_of_others else beside
    if release and family != "clip":
        raise WeightsError(f"is a {family}, and the release {release} is a CLIP")
    if release or (evidence and family == "clip"):
        stated = RELEASES[release or "openai"]
        fields = stated.backbone_fields(sizes["vision_patch_size"])
        source = evidence or f"the release {release}"
        if release and beside and (wrong := _disagreement(beside.fields, fields)):
            raise WeightsError(
                f"{source} does not go with {path.with_name(beside.name)}: {wrong}; move that file"
                f"{'' if evidence else ', or leave the release out'}",
                names_file=True,
            )
        known |= fields
        if release:
            is_guessed, licence = False, stated.licence
    if beside:
        known |= beside.fields
        source, is_guessed = beside.name, False
    if "activation" not in known:
        raise WeightsError(
            f"{UNSTATED}, and neither a config.json nor an open_clip_config.json"
            f" beside it does; name the release ({RELEASE_FLAGS}), one of {', '.join(RELEASES)}"
        )
    if family == "siglip":
        known = {"text_cleaning": "lower", **known}
        if "pad_id" not in known:
            raise WeightsError(
                f"has {sizes['vocab_size']} tokens, unlike SigLIP and SigLIP 2; a config.json"
                ' beside it has to say "pad_id", and "text_cleaning" if that is not "lower"'
            )
    for tower in ("vision", "text"):
        if f"{tower}_heads" not in known:
            known[f"{tower}_heads"] = _heads(tower, sizes[f"{tower}_width"])
    known |= {**sizes, "logit_bias": "logit_bias" in state}
    return Description(BackboneConfig(**known), source, is_guessed, licence)


def check_beside(path: Path, state: StateDict, backbone: BackboneConfig) -> None:
    """Checks a description beside a file that describes itself.

    Raises:
      WeightsError: the description has the sizes of the tensors, and something else differs.
    """
    beside, is_of_others = _read_beside(path, backbone.family, sizes_of(state))
    if beside is None or is_of_others:
        return
    if wrong := _disagreement(beside.fields, dataclasses.asdict(backbone)):
        raise WeightsError(
            f"{path.with_name(beside.name)} contradicts what {path.name} says of itself: {wrong};"
            " move one of them",
            names_file=True,
        )


def _read_beside(
    path: Path | None, family: str, sizes: dict[str, int]
) -> tuple[Beside | None, str]:
    """The description beside a file, and what shows that it is of others; adapts the image size."""
    beside = read_beside(path) if path else None
    if beside is None:
        return None, ""
    # Images that have the patches of the tensors, and more pixels.
    stated, patch = beside.fields.get("image_resolution", 0), sizes["vision_patch_size"]
    if stated // patch == sizes["image_resolution"] // patch:
        sizes["image_resolution"] = stated
    return beside, _disagreement(beside.fields, {"family": family, **sizes})


def _disagreement(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first field with two values; empty if there is none."""
    for name, value in expected.items():
        if name in found and found[name] != value:
            return f"{name} is {found[name]} in one and {value} in the other"
    return ""


def _heads(tower: str, width: int) -> int:
    if width in _HEADS_OF_WIDTH[tower]:
        return _HEADS_OF_WIDTH[tower][width]
    if width % _HEAD_WIDTH or width > _MAX_WIDTH:
        name = "image" if tower == "vision" else tower
        what = f'put a config.json with "{tower}_heads" beside the file (docs/weights.md)'
        raise WeightsError(f"the {name} tower has {width} channels, in unknown heads; {what}")
    return width // _HEAD_WIDTH
