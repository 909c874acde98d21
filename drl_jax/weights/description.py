"""Describes the towers in a file: what its tensors say, what lies beside it, and its release."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import BackboneConfig
from drl_jax.weights.beside import read_beside
from drl_jax.weights.families import FAMILIES, WeightsError, sizes_of
from drl_jax.weights.releases import RELEASES
from drl_jax.weights.tensors import StateDict

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
      notes: on what else is in the file.
    """

    backbone: BackboneConfig
    activation_from: str
    is_guessed: bool = False
    licence: str = ""
    revision: str = ""
    notes: tuple[str, ...] = ()

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
    family: str,
    state: StateDict,
    path: Path | None = None,
    *,
    release: str = "",
    likeness: str = "",
    is_openais: bool = False,
) -> Description:
    """Describes towers from a release, a description beside them, or what their tensors suggest.

    Args:
      family: of the towers.
      state: their tensors under OpenAI's names.
      path: of the file; None if there is none.
      release: a name of `RELEASES`; empty: none is given.
      likeness: what suggests that towers of CLIP are OpenAI's; a description or a release wins.
      is_openais: whether it proves that, as the release openai.

    Raises:
      WeightsError: the activation is unknown, descriptions disagree, or a size cannot be told.
    """
    check_release(release)
    row, sizes = FAMILIES[family], sizes_of(state)
    known = {"family": family, **row.fields, **row.by_vocabulary.get(sizes["vocab_size"], {})}
    source, is_guessed, licence = "its family", True, ""
    said = likeness if is_openais else f"the release {release}"
    if is_openais and release not in ("", "openai"):
        raise WeightsError(f"{path} is {likeness}, not of the release {release}; leave that out")
    release = "openai" if is_openais else release
    if not row.by_vocabulary and sizes["vocab_size"] > _CLIP_VOCABULARY:
        known["text_cleaning"] = "none"  # A multilingual vocabulary.
    if likeness and family == "clip":
        known |= RELEASES["openai"].backbone_fields(sizes["vision_patch_size"])
        source = likeness
    beside = None if path is None else read_beside(path)
    if beside is not None:
        _take_resolution(sizes, beside.fields)
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


def check_beside(path: Path, family: str, state: StateDict, backbone: BackboneConfig) -> None:
    """Checks that a description beside a file that describes itself does not contradict it.

    Args:
      path: of the file.
      family: of its towers.
      state: their tensors under OpenAI's names.
      backbone: what it says of itself.

    Raises:
      WeightsError: the description has the sizes of the tensors, and something else differs.
    """
    beside, sizes = read_beside(path), sizes_of(state)
    if beside is None:
        return
    _take_resolution(sizes, beside.fields)
    if _disagreement(beside.fields, {"family": family, **sizes}):
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


def _take_resolution(sizes: dict[str, int], stated: Mapping[str, Any]) -> None:
    """Takes over a stated size of images that have the patches of the tensors, and more pixels."""
    patch, size = sizes["vision_patch_size"], sizes["image_resolution"]
    if stated.get("image_resolution", 0) // patch == size // patch:
        sizes["image_resolution"] = stated["image_resolution"]


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
        raise WeightsError(
            f"the {name} tower has {width} channels, and nothing says in how many heads; put a"
            f' config.json with "{tower}_heads" beside the file (docs/weights.md)'
        )
    return width // _HEAD_WIDTH
