"""What is known of published towers that their files do not say."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from drl_jax.config import BackboneConfig

_HALF = (0.5, 0.5, 0.5)


class Release(NamedTuple):
    """A set of published CLIP files with the same recipe."""

    activation: str  # of both towers
    licence: str  # of the weights
    fields: Mapping[str, Any] = MappingProxyType({})  # others of BackboneConfig
    patch_activations: Mapping[int, str] = MappingProxyType({})  # by patch size, where it differs

    def backbone_fields(self, patch_size: int) -> dict[str, Any]:
        """Fields of BackboneConfig of a file with this patch size."""
        activation = self.patch_activations.get(patch_size, self.activation)
        return {"activation": activation, **self.fields}


_APPLE = "Apple's (apple-amlr; research)"
_NON_COMMERCIAL = "CC-BY-NC-4.0"
_LAION_400M = Release("gelu", "MIT", patch_activations={32: "quick_gelu"})
# By open_clip's names of pretrained weights (`config.model.release`). Source: open_clip 3.3,
# `pretrained.py`.
RELEASES: dict[str, Release] = {
    "openai": Release("quick_gelu", "MIT"),
    "laion400m_e31": _LAION_400M,
    "laion400m_e32": _LAION_400M,
    "laion2b_s34b_b79k": Release("gelu", "MIT"),
    "laion2b_s34b_b88k": Release("gelu", "MIT"),
    "laion2b_s32b_b82k": Release("gelu", "MIT", {"pixel_mean": _HALF, "pixel_std": _HALF}),
    "datacomp_xl_s13b_b90k": Release("gelu", "MIT"),
    "datacomp_s34b_b86k": Release("gelu", "MIT"),
    "dfn2b": Release("quick_gelu", _APPLE),
    "dfn5b": Release("quick_gelu", _APPLE),
    "dfn2b_s39b": Release("gelu", _APPLE),
    "metaclip_400m": Release("quick_gelu", _NON_COMMERCIAL),
    "metaclip_fullcc": Release("quick_gelu", _NON_COMMERCIAL),
}


class Published(NamedTuple):
    """Published towers with a name of ours: their description, `config.model.init`, and licence."""

    backbone: BackboneConfig
    source: str
    licence: str


CLIP_B32 = BackboneConfig()
CLIP_B16 = dataclasses.replace(CLIP_B32, vision_patch_size=16)
_LAION_B32 = dataclasses.replace(CLIP_B32, activation="gelu")
_SQUASHED: Any = {"pixel_mean": _HALF, "pixel_std": _HALF, "resize": "squash"}
_SIGLIP2_B16 = BackboneConfig(
    family="siglip",
    # Its preprocessor_config.json says it; that of the first SigLIP says bicubic.
    interpolation="bilinear",
    embed_dim=768,
    vision_patch_size=16,
    context_length=64,
    vocab_size=256_000,
    text_width=768,
    text_heads=12,
    activation="gelu_tanh",
    layer_norm_eps=1e-6,
    logit_bias=True,
    text_cleaning="lower",
    **_SQUASHED,
)
_PE_B16 = BackboneConfig(
    family="pe",
    embed_dim=1024,
    vision_patch_size=16,
    context_length=32,
    text_width=1024,
    text_heads=16,
    text_layers=24,
    activation="gelu",
    interpolation="bilinear",
    **_SQUASHED,
)
_LAION_SOURCE = "hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
PUBLISHED: dict[str, Published] = {
    "clip_b32": Published(CLIP_B32, "weights/ViT-B-32.pt", "MIT"),
    "clip_b16": Published(CLIP_B16, "weights/ViT-B-16.pt", "MIT"),
    "clip_laion2b_b32": Published(_LAION_B32, _LAION_SOURCE, "MIT"),
    "siglip2_b16": Published(_SIGLIP2_B16, "hf-hub:google/siglip2-base-patch16-224", "Apache-2.0"),
    "pe_b16": Published(_PE_B16, "hf-hub:facebook/PE-Core-B16-224", "Apache-2.0"),
}
