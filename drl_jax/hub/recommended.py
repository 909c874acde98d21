"""Models for people who have videos and no model of their own.

They are of families that load here, and their licences are permissive. Published zero-shot t2v R@1
on MSR-VTT is 47.6 (PE-Core B/16), 50.3 (L/14) and 31 (CLIP ViT-B/32); SigLIP 2 is multilingual.
"""

from typing import NamedTuple


class Recommended(NamedTuple):
    """A model that is downloaded by its name.

    Attributes:
      source: as `weights.source.weights_path` takes it.
      licence: of the weights.
      languages: of the sentences it was trained with.
    """

    source: str
    licence: str
    languages: str


RECOMMENDED = {
    "general": Recommended("hf-hub:facebook/PE-Core-B16-224", "Apache-2.0", "English"),
    "large": Recommended("hf-hub:facebook/PE-Core-L14-336", "Apache-2.0", "English"),
    "multilingual": Recommended(
        "hf-hub:google/siglip2-base-patch16-224", "Apache-2.0", "English and many others"
    ),
    "fast": Recommended("ViT-B/32", "MIT", "English"),
}
