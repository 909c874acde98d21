"""Describes the towers in a file: what its tensors say, what lies beside it, and its release."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drl_jax.config import BackboneConfig
from drl_jax.hub.releases import RELEASES
from drl_jax.weights.beside import read_beside
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
    source: str  # of the activation: "from", or if nothing says it, "guessed from"
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
            f" {backbone.activation} ({self.source}), licence:"
            f" {self.licence or 'not stated by the file'}"
            f"{self.revision and f', commit {self.revision}'}"
            + "".join(f"; {note}" for note in self.notes)
        )


def describe(
    family: str,
    state: StateDict,
    path: Path | None = None,
    release: str = "",
    evidence: str = "",
    stored: BackboneConfig | None = None,
) -> Description:
    """Describes towers from a release, a description beside them, or what their tensors suggest.

    `state` has OpenAI's names. `evidence` is what proves the release, or suggests that a CLIP is
    OpenAI's; or what has the description `stored`.

    Raises:
      WeightsError: the activation is unknown, descriptions disagree, or a size cannot be told.
    """
    row, sizes = FAMILIES[family], sizes_of(state)
    file, said = read_beside(path) if path else (path, {})
    # Images that have the patches of the tensors, and more pixels.
    pixels, patch = said.get("image_resolution", 0), sizes["vision_patch_size"]
    if patch and pixels // patch == sizes["image_resolution"] // patch:
        sizes["image_resolution"] = pixels
    if wrong := _disagreement(said, {"family": family, **sizes}):
        if not (release or stored):
            raise WeightsError(
                f"is beside {file}, which describes other weights: {wrong}; move one of them, or"
                f" name the release ({RELEASE_FLAGS})"
            )
        said = {}
    if stored:
        # The others may be stated in more than one way.
        same = [name for name in sizes if name != "image_resolution" and "mlp" not in name]
        if any(sizes[name] != getattr(stored, name) for name in same):
            raise WeightsError("has a configuration of other sizes than its tensors")
        if wrong := _disagreement(said, dataclasses.asdict(stored)):
            raise WeightsError(f"contradicts {file}: {wrong}; move one of them")
        return Description(stored, f"from {evidence}")
    known = {"family": family, **row.fields, **row.by_vocabulary.get(sizes["vocab_size"], {})}
    source, licence = "guessed from its family", ""
    if not row.by_vocabulary and sizes["vocab_size"] > BackboneConfig.vocab_size:
        known["text_cleaning"] = "none"  # A multilingual vocabulary.
    if release and family != "clip":
        raise WeightsError(f"is a {family}, and the release {release} is a CLIP")
    if release or (evidence and family == "clip"):
        recipe = RELEASES[release or "openai"]
        fields = recipe.backbone_fields(patch)
        by = evidence or f"the release {release}"
        if release and (wrong := _disagreement(said, fields)):
            leave = "" if evidence else ", or leave the release out"
            raise WeightsError(f"as {by} does not go with {file}: {wrong}; move it{leave}")
        known |= fields
        source, licence = (f"from {by}", recipe.licence) if release else (f"guessed from {by}", "")
    if said:
        known |= said
        source = f"from {file.name}"
    if "activation" not in known:
        raise WeightsError(
            f"{UNSTATED}, and neither a config.json nor an open_clip_config.json"
            f" beside it does; name the release ({RELEASE_FLAGS}), one of {', '.join(RELEASES)}"
        )
    if family == "siglip" and "pad_id" not in known:
        raise WeightsError(
            f"has {sizes['vocab_size']} tokens, unlike SigLIP and SigLIP 2; a config.json"
            ' beside it has to say "pad_id", and "text_cleaning" if that is not "lower"'
        )
    for tower in ("vision", "text"):
        if f"{tower}_heads" not in known:
            known[f"{tower}_heads"] = _heads(tower, sizes[f"{tower}_width"])
    known |= {**sizes, "logit_bias": "logit_bias" in state}
    return Description(BackboneConfig(**known), source, licence)


def _disagreement(said: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first field with two values; empty if there is none."""
    for name, found in said.items():
        if found != expected.get(name, found):
            return f"{name} is {found} in one and {expected[name]} in the other"
    return ""


def _heads(tower: str, width: int) -> int:
    if width in _HEADS_OF_WIDTH[tower]:
        return _HEADS_OF_WIDTH[tower][width]
    if width % _HEAD_WIDTH or width > _MAX_WIDTH:
        name = "image" if tower == "vision" else tower
        what = f'put a config.json with "{tower}_heads" beside the file (docs/weights.md)'
        raise WeightsError(f"the {name} tower has {width} channels, in unknown heads; {what}")
    return width // _HEAD_WIDTH
