"""ti and wti: every token is matched with its best frame, every frame with its best token.

Shapes as in `base`.
"""

import itertools
import re
from collections.abc import Collection
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal

from drl_jax.config import ModelConfig
from drl_jax.models.interactions.base import (
    Arrays,
    Attribution,
    Features,
    Interaction,
    frames_as_tokens,
    unit_sum,
    valid_units,
    weighted_sum,
)
from drl_jax.models.linear import linear_without_bias_gradient
from drl_jax.models.ops import (
    equal_weights,
    l2_normalize,
    masked_softmax,
    mean_entropy,
    mean_outer_product,
    random_valid,
    weighted_outer_product,
)
from drl_jax.models.towers import TextFeatures


class TokenWise(Interaction):
    """ti: token-wise interaction with equal weights."""

    CDCR_VARIANTS: ClassVar = (0, 1, 2)
    TEXT_ARRAYS: ClassVar = ("text_unit", "text_mask", "text_weight")
    VIDEO_ARRAYS: ClassVar = ("frame_unit", "frame_mask", "frame_weight")
    COMPARES_TOKENS: ClassVar = True

    def encode_text(self, text: TextFeatures, text_mask: jax.Array) -> Arrays:
        return {
            "text_unit": l2_normalize(text.tokens),
            "text_mask": text_mask,
            "text_weight": self.text_weights(text.tokens, text_mask),
        }

    def encode_video(self, frame_feat: jax.Array, frame_mask: jax.Array) -> Arrays:
        return {
            "frame_unit": l2_normalize(frame_feat),
            "frame_mask": frame_mask,
            "frame_weight": self.frame_weights(frame_feat, frame_mask),
        }

    def text_weights(self, text_feat: jax.Array, text_mask: jax.Array) -> jax.Array:
        """Weight of each token in its sentence, [A, L], from features before normalisation."""
        return equal_weights(text_mask)

    def frame_weights(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """Weight of each frame in its video, [B, F], from features before normalisation."""
        return equal_weights(frame_mask)

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        return weighted_token_wise(text, video)

    def channel_correlation(
        self, text: Arrays, video: Arrays, key: jax.Array, cdcr: int
    ) -> jax.Array:
        """Rows by variant: 1: a random valid token and frame of each pair; 2: every valid token
        with its most similar frame, and every valid frame with its most similar token, the mean of
        both correlations; 3: as 2, weighted by the interaction's weights.
        """
        if cdcr == 1:
            text_key, video_key = jax.random.split(key)
            return mean_outer_product(
                random_valid(text["text_unit"], text["text_mask"], text_key),
                random_valid(video["frame_unit"], video["frame_mask"], video_key),
            )
        return matched_correlation(text, video, weighted=cdcr == 3)

    @classmethod
    def attribution(cls, text: Features, video: Features) -> Attribution:
        tokens, frames = valid_units(text, video)
        similarity = tokens @ frames.T
        token_weight = text["text_weight"][text["text_mask"]]
        frame_weight = video["frame_weight"][video["frame_mask"]]
        # Where there is padding, the largest similarity is at least the padding's 0.
        token_floor = -np.inf if video["frame_mask"].all() else 0
        frame_floor = -np.inf if text["text_mask"].all() else 0
        contribution = frame_weight * np.maximum(similarity.max(axis=0), frame_floor)
        by_token = token_weight * np.maximum(similarity.max(axis=1), token_floor)
        np.add.at(contribution, similarity.argmax(axis=1), by_token)
        return Attribution(similarity, token_weight, frame_weight, contribution / 2)

    @classmethod
    def pool_text(cls, text: Features) -> np.ndarray:
        """The sum of the unit tokens by their weights (`query_vectors`), normalised."""
        return unit_sum(text["text_unit"], text["text_weight"])

    @classmethod
    def pool_video(cls, video: Features) -> np.ndarray:
        return unit_sum(video["frame_unit"], video["frame_weight"])

    @classmethod
    def query_vectors(cls, text: Features) -> np.ndarray:
        """The sum of the unit tokens by their weights.

        Its dot product with that of a video's frames is the weighted mean of the similarities of
        all pairs of tokens and frames. `similarity` takes maxima, and is at least as large.
        """
        return weighted_sum(text["text_unit"], text["text_weight"])

    @classmethod
    def video_vectors(cls, video: Features) -> np.ndarray:
        return weighted_sum(video["frame_unit"], video["frame_weight"])

    @classmethod
    def video_as_text(cls, video: Features) -> Features:
        return {**frames_as_tokens(video), "text_weight": video["frame_weight"]}


class WeightedTokenWise(TokenWise):
    """wti: token-wise interaction with learned weights of tokens and frames."""

    INHERITS: ClassVar = ("explanation", "pooled", "vectors")
    CDCR_VARIANTS: ClassVar = (0, 1, 2, 3)

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, layers = config.backbone.embed_dim, config.wti_arch
        self.text_weight_fc = TokenWeight(width, layers, rngs=rngs)
        self.video_weight_fc = TokenWeight(width, layers, rngs=rngs)

    def text_weights(self, text_feat: jax.Array, text_mask: jax.Array) -> jax.Array:
        return self.text_weight_fc(text_feat, text_mask)

    def frame_weights(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        return self.video_weight_fc(frame_feat, frame_mask)

    def statistics(self, text: Arrays, video: Arrays) -> Arrays:
        """Entropies of the learned weights."""
        sides = {"word_entropy": text["text_weight"], "frame_entropy": video["frame_weight"]}
        return {name: mean_entropy(jax.lax.stop_gradient(w)) for name, w in sides.items()}

    @classmethod
    def config_error(cls, config: ModelConfig) -> str:
        if config.wti_arch not in (1, 2, 3):
            return f"model.wti_arch is 1, 2 or 3, not {config.wti_arch}"
        return ""

    @classmethod
    def reference_name(cls, path: str, paths: Collection[str]) -> str | None:
        """Layers count as in a Sequential of linear layers and ReLUs; one layer has none."""
        match = re.match(r"(text|video)_weight_fc/fc/(\d+)/(\w+)$", path)
        if not match:
            return None
        side, layer, leaf = match.groups()
        if f"{side}_weight_fc/fc/1/kernel" not in paths:
            return f"{side}_weight_fc/{leaf}"
        return f"{side}_weight_fc/{2 * int(layer)}/{leaf}"

    @classmethod
    def config_of_weights(cls, names: Collection[str]) -> dict[str, Any] | None:
        layers = [n for n in names if re.match(r"text_weight_fc\.(\d+\.)?weight$", n)]
        return {"wti_arch": len(layers)} if layers else None


class TokenWeight(nnx.Module):
    """Weight of each token in its sentence, or of each frame in its video."""

    def __init__(self, width: int, layers: int, *, rngs: nnx.Rngs):
        sizes = [width] * layers + [1]
        self.fc = nnx.List(
            nnx.Linear(n_in, n_out, kernel_init=normal(0.02), rngs=rngs)
            for n_in, n_out in itertools.pairwise(sizes)
        )

    def __call__(self, feat: jax.Array, mask: jax.Array) -> jax.Array:
        """feat [B, L, D] *before* normalisation, mask bool [B, L] -> weights float32 [B, L]."""
        for layer in self.fc[:-1]:
            feat = jax.nn.relu(layer(feat))
        return masked_softmax(linear_without_bias_gradient(self.fc[-1], feat)[..., 0], mask)


def weighted_token_wise(text: Arrays, video: Arrays) -> jax.Array:
    """Token-wise similarity of every text with every video: float32 [A, B] in [-1, 1].

    The mean of two weighted sums: over tokens, of the similarity with their best frame, and over
    frames, of the similarity with their best token. The arrays are those of `TokenWise.encode_text`
    [A, L, ...] and `encode_video` [B, F, ...]; weights sum to 1 over valid positions.
    """
    # Masked by multiplication, as in the reference: a padded position has similarity 0, not -inf.
    # Where all valid similarities are negative, the maximum is the 0 of the padding. Trained
    # checkpoints depend on it.
    text_unit = text["text_unit"] * text["text_mask"][:, :, None]
    frame_unit = video["frame_unit"] * video["frame_mask"][:, :, None]
    # The product is [B, F, A, L] without a transposition.
    token_sim = jnp.einsum("bfd,ald->bfal", frame_unit, text_unit)
    t2v = jnp.einsum("bal,al->ab", token_sim.max(axis=1), text["text_weight"])
    v2t = jnp.einsum("bfa,bf->ab", token_sim.max(axis=3), video["frame_weight"])
    return (t2v + v2t) / 2


def matched_correlation(text: Arrays, video: Arrays, *, weighted: bool) -> jax.Array:
    """Correlation over tokens with their best frames and frames with their best tokens: [D, D]."""
    text_unit, text_mask, text_weight = (text[name] for name in TokenWise.TEXT_ARRAYS)
    frame_unit, frame_mask, frame_weight = (video[name] for name in TokenWise.VIDEO_ARRAYS)
    pairs = len(text_unit)
    # Partners come from the matched pair alone: [B, L, F], masked as in `weighted_token_wise` (a
    # padded position has similarity 0 and may be chosen over negative ones).
    token_sim = jnp.einsum("bld,bfd->blf", text_unit, frame_unit)
    token_sim = token_sim * text_mask[:, :, None] * frame_mask[:, None, :]
    best_frame = jnp.argmax(token_sim, axis=2)[:, :, None]  # [B, L, 1]
    best_token = jnp.argmax(token_sim, axis=1)[:, :, None]  # [B, F, 1]
    if weighted:
        text_weight, frame_weight = text_weight / pairs, frame_weight / pairs
    else:
        text_weight = text_mask / jnp.sum(text_mask)
        frame_weight = frame_mask / jnp.sum(frame_mask)
    by_token = weighted_outer_product(
        text_unit, jnp.take_along_axis(frame_unit, best_frame, axis=1), text_mask, text_weight
    )
    by_frame = weighted_outer_product(
        frame_unit, jnp.take_along_axis(text_unit, best_token, axis=1), frame_mask, frame_weight
    )
    return (by_token + by_frame) / 2
