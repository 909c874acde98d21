"""dp: cosine of the sentence feature and the pooled frame features."""

from typing import ClassVar

import jax
import numpy as np

from drl_jax.models.interactions.base import (
    Arrays,
    Features,
    Interaction,
    frames_as_tokens,
    unit_features,
)
from drl_jax.models.ops import l2_normalize, masked_mean, mean_outer_product
from drl_jax.models.towers import TextFeatures


class DotProduct(Interaction):
    """Cosine of the sentence feature and the mean of the unit frame features."""

    # The reference computes the same for 1, 2 and 3.
    CDCR_VARIANTS: ClassVar = (0, 1, 2, 3)
    TEXT_ARRAYS: ClassVar = ("sentence_unit",)
    VIDEO_ARRAYS: ClassVar = ("video_unit",)
    INHERITS: ClassVar = ("explanation", "pooled")

    def encode_text(self, text: TextFeatures, text_mask: jax.Array) -> Arrays:
        return {"sentence_unit": l2_normalize(text.sentence)}

    def encode_video(self, frame_feat: jax.Array, frame_mask: jax.Array) -> Arrays:
        return {"video_unit": l2_normalize(masked_mean(l2_normalize(frame_feat), frame_mask))}

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        return text["sentence_unit"] @ video["video_unit"].T

    def channel_correlation(
        self, text: Arrays, video: Arrays, key: jax.Array, cdcr: int
    ) -> jax.Array:
        """Rows: the sentence and the video vector of each pair."""
        return mean_outer_product(text["sentence_unit"], video["video_unit"])

    @classmethod
    def pool_video(cls, video: Features) -> np.ndarray:
        """What the interaction compares: their cosines are the similarities."""
        return unit_features(video, "video")

    @classmethod
    def query_vectors(cls, text: Features) -> np.ndarray:
        return text["sentence_unit"]

    @classmethod
    def video_vectors(cls, video: Features) -> np.ndarray:
        return video["video_unit"]

    @classmethod
    def video_as_text(cls, video: Features) -> Features:
        return {**frames_as_tokens(video), "sentence_unit": unit_features(video, "video")}
