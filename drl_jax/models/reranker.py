"""A joint encoder of a sentence and a video, which ranks the first candidates of a search again.

It reads what the index compares: the words and frames of ti and wti. Shapes: P pairs, T positions
of words and frames together, D channels.
"""

import dataclasses
import functools
import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.nn.initializers import normal, zeros

from drl_jax.config import ModelConfig
from drl_jax.models.attention import AttentionMask
from drl_jax.models.drl import Params, copies_text_tower, copy_first_blocks
from drl_jax.models.interactions import INTERACTIONS, Arrays, Features
from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.models.layers import (
    BERT_LN_EPS,
    BlockConfig,
    Transformer,
    layer_norm,
    new_block_config,
    new_block_init,
)
from drl_jax.models.linear import Linear, without_adapters
from drl_jax.models.ops import masked_softmax
from drl_jax.runtime.errors import UserError

_LAYERS = 4
_PRIOR_WIDTH = 64
# Positions of a batch of pairs are a multiple of it: few shapes, and few programs to compile.
_ROUNDED = 8


class RerankerConfig(NamedTuple):
    """The sizes of a reranker; the last two are of its position embeddings."""

    width: int
    heads: int
    hidden_width: int
    activation: str
    layers: int
    words: int
    frames: int

    @classmethod
    def of(cls, model: ModelConfig, words: int, frames: int) -> "RerankerConfig":
        """The sizes for a first stage; UserError: its index has no arrays of words and frames."""
        found = INTERACTIONS[model.interaction]
        wanted = {*TokenWise.TEXT_ARRAYS, *TokenWise.VIDEO_ARRAYS}
        if not wanted <= {*found.TEXT_ARRAYS, *found.VIDEO_ARRAYS}:
            raise UserError(
                f"a reranker reads the words and frames of ti and wti; the interaction"
                f" {model.interaction} does not have them"
            )
        block = new_block_config(model.backbone)
        sizes = (block.width, block.heads, block.hidden_width, block.activation)
        return cls(*sizes, _LAYERS, words, frames)


class Reranker(nnx.Module):
    """[pooling token; words; frames] -> what is added to the logit of the first stage.

    The logit of a pair is `exp(logit_scale) * score + delta`; the last layer of `delta` is 0 at
    first.
    """

    def __init__(self, config: RerankerConfig, dtype: str, *, rngs: nnx.Rngs):
        width, self.words = config.width, config.words
        # As long as the features, which are unit vectors.
        embed = functools.partial(nnx.Embed, embedding_init=normal(width**-0.5), rngs=rngs)
        linear = functools.partial(Linear, kernel_init=normal(0.02), dtype=jnp.float32, rngs=rngs)
        self.pool = nnx.Param(normal(0.02)(rngs.params(), (width,)))
        # Of words, then of frames: they are the embeddings of both types, too.
        self.position_embeddings = embed(config.words + config.frames, width)
        # Of a word and of a frame; multiplied by the weight of the first stage.
        self.weight_embeddings = embed(2, width)
        # Of what a word, or a frame, is most similar to on the other side.
        self.match = linear(width, width, kernel_init=normal(width**-0.5))
        self.match_scale = nnx.Param(jnp.zeros(()))
        self.transformer = Transformer(
            BlockConfig(*config[:4], eps=BERT_LN_EPS),
            config.layers,
            init=new_block_init(),
            run=dataclasses.replace(ModelConfig(), dtype=dtype, remat="dots"),
            rngs=rngs,
        )
        self.ln_pool = layer_norm(width, BERT_LN_EPS, rngs=rngs)
        # Scores differ little: a kernel of the usual size would not tell them apart.
        self.prior_in = linear(1, _PRIOR_WIDTH, kernel_init=normal(1.0))
        self.prior_out = linear(_PRIOR_WIDTH, width)
        self.dense = linear(width, width)
        # A bias would change no order, and has no gradient.
        self.delta = linear(width, 1, use_bias=False, kernel_init=zeros)
        self.logit_scale = nnx.Param(jnp.zeros(()))

    def __call__(self, pairs: Arrays) -> jax.Array:
        """`pair_arrays` [..., T, D] -> delta, float32 [...]."""
        x, mask = self._embedded(pairs)
        x = self.transformer(x, mask, queries=1)[:, 0].astype(jnp.float32)
        prior = self.prior_out(jax.nn.gelu(self.prior_in(pairs["score"].reshape(-1, 1))))
        delta = self.delta(jax.nn.gelu(self.dense(self.ln_pool(x) + prior)))
        return delta.reshape(pairs["score"].shape)

    def attention(self, pairs: Arrays) -> jax.Array:
        """How much the pooling token of the last block attends to words and frames: [P, T].

        The mean of the heads, without the attention to itself; padding has 0.
        """
        x, mask = self._embedded(pairs)
        block, stacked = nnx.split(self.transformer.resblocks)
        *first, last = (
            nnx.merge(block, jax.tree.map(lambda leaf, n=n: leaf[n], stacked))
            for n in range(len(jax.tree.leaves(stacked)[0]))
        )
        for layer in first:
            x = layer(x, mask, x.shape[1])
        q, k, _ = jnp.split(last.attn.in_proj(last.ln_1(x)), 3, axis=-1)
        heads, width = last.attn.heads, x.shape[-1]
        q = q[:, 0].reshape(len(x), heads, width // heads)
        k = k.reshape(*x.shape[:2], heads, width // heads)
        logits = jnp.einsum("bkh,btkh->bkt", q, k) / np.sqrt(width // heads)
        valid = jnp.arange(x.shape[1]) < mask.lengths[:, None, None]
        return jax.nn.softmax(jnp.where(valid, logits, -jnp.inf), axis=-1).mean(axis=1)[:, 1:]

    def _embedded(self, pairs: Arrays) -> tuple[jax.Array, AttentionMask]:
        """The sequences [P, 1 + T, D], and their lengths."""
        tokens = pairs["tokens"].astype(jnp.float32)
        position = pairs["position"]
        x = tokens + self.position_embeddings(position)
        is_frame = position >= self.words
        x = x + pairs["weight"][..., None] * self.weight_embeddings(is_frame.astype(jnp.int32))
        # The matches of the first stage tell a word where it is, which a new transformer would have
        # to learn.
        similarity = jnp.exp(self.match_scale[...]) * jnp.einsum(
            "...td,...sd->...ts", tokens, tokens
        )
        is_valid = jnp.arange(x.shape[-2]) < pairs["length"][..., None] - 1
        is_other = (is_frame[..., :, None] != is_frame[..., None, :]) & is_valid[..., None, :]
        matched = jnp.matmul(masked_softmax(similarity, is_other), x)
        x = (x + self.match(matched)).reshape(-1, *x.shape[-2:])
        pool = jnp.broadcast_to(self.pool[...], (len(x), 1, x.shape[-1]))
        return jnp.concatenate([pool, x], axis=1), AttentionMask(lengths=pairs["length"].ravel())


@functools.cache
def reranker_definition(config: RerankerConfig, dtype: str) -> tuple[nnx.GraphDef, Params]:
    """The module without parameters, and their shapes."""
    traced = nnx.eval_shape(lambda: Reranker(config, dtype, rngs=nnx.Rngs(0)))
    definition, params = nnx.split(traced)
    return definition, nnx.to_pure_dict(params)


def init_reranker(
    config: RerankerConfig, model: ModelConfig, first_stage: Params, key: jax.Array
) -> Params:
    """New parameters: the first stage's temperature, and blocks of its text tower if they fit."""
    reranker = Reranker(config, model.dtype, rngs=nnx.Rngs(key))
    params = nnx.to_pure_dict(nnx.split(reranker)[1])
    backbone = without_adapters(first_stage["backbone"])
    for name in ("logit_scale", "match_scale"):
        params[name] = jnp.array(backbone["logit_scale"])
    if copies_text_tower(model):
        tower = backbone["transformer"]
        params["transformer"] = jax.tree.map(copy_first_blocks, params["transformer"], tower)
    return params


def first_stage_sha256(params: Params) -> str:
    """Identifies the parameters of a first stage, which a reranker belongs to."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def pair_arrays(
    config: RerankerConfig,
    text: Features,
    video: Features,
    rows: np.ndarray,
    columns: np.ndarray,
    scores: np.ndarray,
) -> Features:
    """What a reranker reads of pairs of texts `rows` and videos `columns`, int [...].

    `scores` are their similarities. Features are bfloat16, as an index stores them. Words and
    frames are without the padding between them, as many as the longest pair has.
    """
    words = text["text_mask"].sum(axis=1)[rows]
    frames = video["frame_mask"].sum(axis=1)[columns]
    longest = -(-(1 + int((words + frames).max())) // _ROUNDED) * _ROUNDED - 1
    place = np.broadcast_to(np.arange(longest), (*rows.shape, longest))
    is_word = place < words[..., None]
    is_valid = place < (words + frames)[..., None]
    word = np.minimum(place, text["text_mask"].shape[1] - 1)
    frame = np.clip(place - words[..., None], 0, video["frame_mask"].shape[1] - 1)

    def joined(name: str) -> np.ndarray:
        of_word = text[f"text_{name}"][rows[..., None], word]
        of_frame = video[f"frame_{name}"][columns[..., None], frame]
        shape = (*place.shape, *[1] * (of_word.ndim - place.ndim))
        found = np.where(is_word.reshape(shape), of_word, of_frame)
        return np.where(is_valid.reshape(shape), found, 0)

    # Weights sum to 1, and are more the fewer there are.
    count = np.where(is_word, words[..., None], frames[..., None])
    position = np.where(
        is_word,
        np.minimum(place, config.words - 1),
        config.words + np.minimum(frame, config.frames - 1),
    )
    return {
        "tokens": joined("unit").astype(ml_dtypes.bfloat16),
        "weight": (joined("weight") * count).astype(np.float32),
        "position": np.where(is_valid, position, 0).astype(np.int32),
        "length": (1 + words + frames).astype(np.int32),
        "score": scores.astype(np.float32),
    }
