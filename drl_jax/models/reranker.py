"""Ranks the first candidates of a search again, by words and the order of frames.

It reads what the index compares: the words and frames of ti and wti. Shapes: A texts of L words, B
videos of F frames, D channels, K heads.
"""

import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params
from drl_jax.models.interactions import INTERACTIONS, Arrays, Features
from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.models.linear import Linear
from drl_jax.models.ops import masked_softmax
from drl_jax.runtime.errors import UserError

_HEADS = 8
# Directions whose variance is below this part of the largest one are noise.
_WHITENING_EPS = 1e-3
# A step of Adam moves all entries alike: with means times this, it changes logits by about 1 in all
# sizes.
_SCALE = 40.0


class RerankerConfig(NamedTuple):
    """The sizes of a reranker: channels of words and frames, and most frames of a video."""

    width: int
    frames: int

    @classmethod
    def of(cls, model: ModelConfig, frames: int) -> "RerankerConfig":
        """The sizes for a first stage; UserError: its index has no arrays of words and frames."""
        found = INTERACTIONS[model.interaction]
        wanted = {*TokenWise.TEXT_ARRAYS, *TokenWise.VIDEO_ARRAYS}
        if not wanted <= {*found.TEXT_ARRAYS, *found.VIDEO_ARRAYS}:
            raise UserError(
                f"a reranker reads the words and frames of ti and wti; the interaction"
                f" {model.interaction} does not have them"
            )
        return cls(model.backbone.embed_dim, frames)


class Reranker(nnx.Module):
    """What is added to the logit of the first stage: a product of a text and of frames in order.

    The logit of a pair is `exp(logit_scale) * similarity + change`. Of a text, K heads attend to
    its words, and an MLP reads them; of a video, each place in time has a linear layer of its own.
    The change is 0 at first.
    """

    def __init__(self, config: RerankerConfig, *, rngs: nnx.Rngs):
        width = config.width

        def linear(inputs: int, outputs: int, *, use_bias: bool = True) -> Linear:
            init = normal(inputs**-0.5)
            return Linear(
                inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=jnp.float32, rngs=rngs
            )

        # `whitening`: what tells videos apart is in directions of little variance.
        self.words_in, self.frames_in = linear(width, width), linear(width, width)
        self.heads = linear(width, _HEADS, use_bias=False)
        self.hidden = linear(_HEADS * width, 2 * width)
        self.text_out = linear(2 * width, width, use_bias=False)
        self.frames_out = nnx.Param(jnp.zeros((config.frames, width, width)))
        self.logit_scale = nnx.Param(jnp.zeros(()))

    def __call__(self, text: Arrays, video: Arrays) -> jax.Array:
        """The interaction's arrays of texts and videos -> change of the logits, float32 [A, B]."""
        of_text, _ = self.text(text)
        return of_text @ self.video(video).sum(axis=1).T

    def text(self, text: Arrays) -> tuple[jax.Array, jax.Array]:
        """What is asked of a video, [A, D], and how much the heads attend to words, [A, K, L]."""
        words = self.words_in(_as_stored(text["text_unit"]))
        logits = jnp.swapaxes(self.heads(words), 1, 2)
        attention = masked_softmax(logits, text["text_mask"][:, None])
        read = jnp.einsum("akl,ald->akd", attention, words).reshape(words.shape[0], -1)
        return self.text_out(jax.nn.gelu(self.hidden(read))), attention

    def video(self, video: Arrays) -> jax.Array:
        """What each frame answers at its place in time, [B, F, D]; padding has 0."""
        most, width, _ = self.frames_out.shape
        frames = self.frames_in(_as_stored(video["frame_unit"])) * video["frame_mask"][..., None]
        layers = self.frames_out[...][: frames.shape[1]]
        return jnp.einsum("bfd,fde->bfe", frames, layers) * (_SCALE**2 / (most * width**2))


def _as_stored(features: jax.Array) -> jax.Array:
    """Features as an index has them: rounded to bfloat16."""
    return features.astype(jnp.bfloat16).astype(jnp.float32)


@functools.cache
def reranker_definition(config: RerankerConfig) -> tuple[nnx.GraphDef, Params]:
    """The module without parameters, and their shapes."""
    traced = nnx.eval_shape(lambda: Reranker(config, rngs=nnx.Rngs(0)))
    definition, params = nnx.split(traced)
    return definition, nnx.to_pure_dict(params)


def init_reranker(
    config: RerankerConfig, first_stage: Params, text: Features, video: Features, key: jax.Array
) -> Params:
    """New parameters, with the first stage's temperature.

    Words and frames are whitened by those of `text` and `video`.
    """
    params = nnx.to_pure_dict(nnx.split(Reranker(config, rngs=nnx.Rngs(key)))[1])
    params["words_in"] = whitening(text["text_unit"][text["text_mask"]])
    params["frames_in"] = whitening(video["frame_unit"][video["frame_mask"]])
    params["logit_scale"] = jnp.array(first_stage["backbone"]["logit_scale"])
    return params


def whitening(features: np.ndarray) -> Params:
    """The linear layer that makes features [N, D] uncorrelated, of mean 0 and variance 1."""
    mean, covariance = features.mean(axis=0), np.cov(features, rowvar=False)
    variances, directions = np.linalg.eigh(covariance)
    floor = _WHITENING_EPS * variances.max()
    kernel = (directions / np.sqrt(np.maximum(variances, 0) + floor)).astype(np.float32)
    return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(-mean @ kernel)}


def first_stage_sha256(params: Params) -> str:
    """Identifies the parameters of a first stage, which a reranker belongs to."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
