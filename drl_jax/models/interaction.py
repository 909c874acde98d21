"""Interactions: how texts and videos are compared (section 3.2 of the paper).

Each interaction prepares the two sides alone (`text`, `video`: what has to be kept of an item, as
named arrays whose first axis is the item), and compares all texts with all videos (`similarity`).

A texts of L tokens, B videos of F frames, D channels.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import normal

from drl_jax.config import ModelConfig
from drl_jax.models.layers import Run, Transformer, new_block_init, quick_gelu
from drl_jax.models.ops import l2_normalize, masked_mean, masked_softmax

Arrays = dict[str, jax.Array]
# The same, of N items on the host.
Features = dict[str, np.ndarray]
# The reference's cross transformer uses BERT's LayerNorm.
_LN_EPS = 1e-12
_CROSS_HEADS = 8


def sentence_feature(text_feat: jax.Array, text_mask: jax.Array) -> jax.Array:
    """The feature of the last valid token (EOS): [A, L, D], bool [A, L] -> [A, D]."""
    last = jnp.sum(text_mask, axis=1) - 1
    return jnp.take_along_axis(text_feat, last[:, None, None], axis=1)[:, 0]


class DotProduct(nnx.Module):
    """dp: cosine of the sentence feature and the mean of the unit frame features."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        del config, rngs

    def text(self, text_feat: jax.Array, text_mask: jax.Array) -> Arrays:
        return {"sentence_feat": l2_normalize(sentence_feature(text_feat, text_mask))}

    def video(self, frame_feat: jax.Array, frame_mask: jax.Array) -> Arrays:
        return {"video_feat": l2_normalize(masked_mean(l2_normalize(frame_feat), frame_mask))}

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        del key
        return text["sentence_feat"] @ video["video_feat"].T


class TokenWise(nnx.Module):
    """ti: every token looks for its best frame and every frame for its best token, all alike."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        del config, rngs

    def text(self, text_feat: jax.Array, text_mask: jax.Array) -> Arrays:
        unit, weight = l2_normalize(text_feat), self.text_weights(text_feat, text_mask)
        return {"text_feat": unit, "text_mask": text_mask, "text_weight": weight}

    def video(self, frame_feat: jax.Array, frame_mask: jax.Array) -> Arrays:
        unit, weight = l2_normalize(frame_feat), self.frame_weights(frame_feat, frame_mask)
        return {"frame_feat": unit, "frame_mask": frame_mask, "frame_weight": weight}

    def text_weights(self, text_feat: jax.Array, text_mask: jax.Array) -> jax.Array:
        """The share of each token in its sentence, [A, L], from features of any length."""
        return text_mask / jnp.sum(text_mask, axis=1, keepdims=True)

    def frame_weights(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        """The share of each frame in its video, [B, F]."""
        return frame_mask / jnp.sum(frame_mask, axis=1, keepdims=True)

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        del key
        return weighted_token_wise(**text, **video)


class WeightedTokenWise(TokenWise):
    """wti: as ti, with weights that are learnt for tokens and frames."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, layers = config.clip.embed_dim, config.wti_arch
        self.text_weight_fc = TokenWeight(width, layers, rngs=rngs)
        self.video_weight_fc = TokenWeight(width, layers, rngs=rngs)

    def text_weights(self, text_feat: jax.Array, text_mask: jax.Array) -> jax.Array:
        return self.text_weight_fc(text_feat, text_mask)

    def frame_weights(self, frame_feat: jax.Array, frame_mask: jax.Array) -> jax.Array:
        return self.video_weight_fc(frame_feat, frame_mask)


class TokenWeight(nnx.Module):
    """The share that each token (or frame) has in its sentence (or video)."""

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
        return masked_softmax(_shifted(self.fc[-1], feat)[..., 0], mask)


def _shifted(layer: nnx.Linear, x: jax.Array) -> jax.Array:
    """A linear layer whose bias adds the same to everything that a softmax then compares.

    The loss cannot see that bias. What would reach it as a gradient is rounding, which Adam
    enlarges and which differs between device counts; so it gets none.
    """
    return x @ layer.kernel[...] + jax.lax.stop_gradient(layer.bias[...])


class CrossTransformer(nnx.Module):
    """xti: a transformer over the sentence and the frames of each pair."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width = config.clip.embed_dim
        self.dropout = config.cross_dropout
        self.position_embeddings = nnx.Embed(
            config.clip.context_length, width, embedding_init=normal(0.02), rngs=rngs
        )
        self.transformer = Transformer(
            width,
            config.cross_layers,
            _CROSS_HEADS,
            eps=_LN_EPS,
            init=new_block_init(),
            # It sees every pair of the batch: kept whole, its layers would fill any memory.
            run=Run.of(config)._replace(remat=True),
            rngs=rngs,
        )
        self.ln_pool = nnx.LayerNorm(width, epsilon=_LN_EPS, dtype=jnp.float32, rngs=rngs)
        self.dense = nnx.Linear(width, width, kernel_init=normal(0.02), rngs=rngs)
        self.similarity_dense = nnx.Linear(width, 1, kernel_init=normal(0.02), rngs=rngs)

    def text(self, text_feat: jax.Array, text_mask: jax.Array) -> Arrays:
        return {"sentence_feat": sentence_feature(text_feat, text_mask)}

    def video(self, frame_feat: jax.Array, frame_mask: jax.Array) -> Arrays:
        return {"frame_feat": frame_feat, "frame_mask": frame_mask}

    def similarity(self, text: Arrays, video: Arrays, key: jax.Array | None = None) -> jax.Array:
        """With a key, drops out embeddings as in training."""
        sentence, frames, mask = text["sentence_feat"], video["frame_feat"], video["frame_mask"]
        (texts, width), (videos, length) = sentence.shape, mask.shape
        sentence = jnp.broadcast_to(sentence[:, None, None], (texts, videos, 1, width))
        frames = jnp.broadcast_to(frames, (texts, *frames.shape))
        x = jnp.concatenate([sentence, frames], axis=2)  # [A, B, 1+F, D]
        x = x + self.position_embeddings(jnp.arange(1 + length))
        if key is not None and self.dropout:
            x = nnx.Dropout(self.dropout)(x, rngs=nnx.Rngs(dropout=key))
        mask = jnp.concatenate([jnp.ones((videos, 1), bool), mask], axis=1)
        mask = jnp.broadcast_to(mask, (texts, *mask.shape)).reshape(-1, 1, 1, 1 + length)
        x = self.transformer(x.reshape(-1, 1 + length, width), mask)  # [A*B, 1+F, D]
        pooled = quick_gelu(self.dense(self.ln_pool(x)[:, 0]))
        return _shifted(self.similarity_dense, pooled).reshape(texts, videos)


INTERACTIONS = {
    "dp": DotProduct,
    "ti": TokenWise,
    "wti": WeightedTokenWise,
    "xti": CrossTransformer,
}


def weighted_token_wise(
    text_feat: jax.Array,
    frame_feat: jax.Array,
    text_mask: jax.Array,
    frame_mask: jax.Array,
    text_weight: jax.Array,
    frame_weight: jax.Array,
) -> jax.Array:
    """Token-wise similarity of every text with every video.

    Each token looks for its best frame and each frame for its best token; the weights add up both.

    Args:
      text_feat: [A, L, D], unit vectors.
      frame_feat: [B, F, D], unit vectors.
      text_mask: bool [A, L].
      frame_mask: bool [B, F].
      text_weight: [A, L], sums to 1 over valid tokens.
      frame_weight: [B, F], sums to 1 over valid frames.

    Returns:
      sim_matrix float32 [A, B], in [-1, 1], without the temperature.
    """
    # Masked before the product, so that what is masked has similarity 0 and not -inf, as in the
    # reference: where every valid similarity is negative, the maximum is the 0 of the padding.
    # Trained checkpoints depend on it.
    text_feat = text_feat * text_mask[:, :, None]
    frame_feat = frame_feat * frame_mask[:, :, None]
    # [B, F, A, L] is how the product comes out of the matrix unit: no transposition.
    token_sim = jnp.einsum("bfd,ald->bfal", frame_feat, text_feat)
    t2v = jnp.einsum("bal,al->ab", token_sim.max(axis=1), text_weight)
    v2t = jnp.einsum("bfa,bf->ab", token_sim.max(axis=3), frame_weight)
    return (t2v + v2t) / 2


def over_video_blocks(
    similarity: Callable[[Arrays, jax.Array | None], jax.Array],
    video: Arrays,
    key: jax.Array | None,
    block: int,
) -> jax.Array:
    """`similarity(video, key)`, over blocks of videos one after another to save memory.

    The backward pass compares each block again instead of keeping what it needs.

    Args:
      similarity: of the arrays of N videos, to [A, N]; each column depends on its video alone.
      video: the interaction's arrays of B videos.
      key: for dropout (each block has its own), or None.
      block: videos of a block; 0: all.

    Returns:
      [A, B].
    """
    videos = len(jax.tree.leaves(video)[0])
    if not block or videos <= block:
        return similarity(video, key)
    blocks = -(-videos // block)
    size = -(-videos // blocks)  # even blocks need the least padding

    def split(x: jax.Array) -> jax.Array:
        padding = ((0, blocks * size - videos), *[(0, 0)] * (x.ndim - 1))
        return jnp.pad(x, padding).reshape(blocks, size, *x.shape[1:])

    @jax.checkpoint
    def compare(part: tuple[jax.Array, Arrays]) -> jax.Array:
        index, arrays = part
        return similarity(arrays, None if key is None else jax.random.fold_in(key, index))

    columns = jax.lax.map(compare, (jnp.arange(blocks), jax.tree.map(split, video)))
    return jnp.moveaxis(columns, 0, 1).reshape(columns.shape[1], -1)[:, :videos]
