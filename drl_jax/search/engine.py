"""Exact search: compares every indexed video with the query, by the model's own interaction.

Videos are compared in blocks of one shape, sharded over the devices. Each device returns the best
of its shard, and only these are merged.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, model_definition
from drl_jax.models.interactions import Features
from drl_jax.models.interactions.base import similarity_in_blocks
from drl_jax.search.blocks import Blocks
from drl_jax.search.quantization import dequantize
from drl_jax.search.slots import by_part, take_rows
from drl_jax.sharding import AXIS, Layout

# Videos per block, on all devices together.
BLOCK = 16384
# Slots of a block at least, also where a part of the index has fewer.
_SMALL = 2048
# Instead of weights: the best of several queries counts.
BEST = "best"
# Name of the weights of queries beside the arrays of texts.
_WEIGHTS = "query_weights"
# Name of what is subtracted from the similarities of videos, beside their arrays.
_BIAS = "bias"
# Videos that a device compares at a time: their features, as float32, fit in its caches.
_COMPARED = 128


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best videos of each query.

    Attributes:
      scores: float32 [Q, k], descending; k is at most the number of videos.
      slots: int [Q, k], rows of the gallery's arrays.
    """

    scores: np.ndarray
    slots: np.ndarray


class Gallery:
    """Stored arrays of videos, in blocks of consecutive slots, sharded over the devices."""

    def __init__(
        self,
        parts: Sequence[Features],
        slots: Sequence[int] | np.ndarray,
        layout: Layout,
        *,
        block: int = BLOCK,
    ):
        """Creates a gallery; nothing is read before the first query.

        Args:
          parts: stored arrays (`quantization.quantize`) of each part of an index, one row per slot
            of the part; may be memory maps. A part without videos may have no arrays.
          slots: int [V], those that are videos (`slots.py`).
          layout: mesh and shardings.
          block: slots per block, at most.
        """
        ends = [0] * len(parts)
        for part, _, rows in by_part(slots):
            ends[part] = int(rows.max()) + 1
        used = [end for end in ends if end]
        block = min(block, max(used))
        if len(used) > 1:
            # One shape for all parts, and no other one when they grow a little. A part that is
            # smaller than a block is copied to fill it.
            block = min(block, 1 << (max(min(used), _SMALL).bit_length() - 1))
        share = -(-block // layout.device_count)
        if share > _COMPARED:
            # Without a remainder: for one, `similarity_in_blocks` would copy the whole block.
            share = -(-share // _COMPARED) * _COMPARED
        else:
            # Few shapes: a growing index is compiled for a few times.
            share = 1 << (share - 1).bit_length()
        self.layout, self.block = layout, share * layout.device_count
        self._blocks = Blocks(parts, ends, self.block, layout)
        self._biases: Sequence[np.ndarray] | None = None
        self._choose(slots)

    def _choose(self, slots: Sequence[int] | np.ndarray) -> None:
        self.size = len(slots)
        self._valid = [np.zeros(end, bool) for end in self._blocks.ends]
        for part, _, rows in by_part(slots):
            self._valid[part][rows] = True

    @property
    def nbytes(self) -> int:
        """Bytes that a query reads."""
        return self._blocks.nbytes

    def only(self, slots: Sequence[int] | np.ndarray) -> "Gallery":
        """A gallery of some of the videos, with the same slots; shares the blocks."""
        gallery = copy.copy(self)
        gallery._choose(slots)
        return gallery

    def with_biases(self, biases: Sequence[np.ndarray]) -> "Gallery":
        """A gallery of the same videos that ranks by similarity minus bias, and scores by it.

        Args:
          biases: of each part, float32 [S], one per slot.
        """
        gallery = copy.copy(self)
        gallery._biases = biases
        return gallery

    def copied(self, slots: Sequence[int] | np.ndarray) -> "Gallery":
        """A gallery with copies of some videos; its slot n is the n-th of `slots`."""
        arrays = take_rows(self._blocks.parts, slots)
        gallery = Gallery([arrays], np.arange(len(slots)), self.layout, block=self.block)
        if self._biases is None:
            return gallery
        biases = take_rows([{_BIAS: part} for part in self._biases], slots)
        return gallery.with_biases([biases[_BIAS]])

    def blocks(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields the first slot and the arrays of each block.

        With `valid`: which of its slots are videos; and with biases, if the gallery has some.
        """
        rows = {"valid": self._valid}
        if self._biases is not None:
            rows[_BIAS] = self._biases
        for block, arrays in self._blocks.read():
            of_block = {name: block.rows_of(parts[block.part]) for name, parts in rows.items()}
            yield block.first_slot, {**arrays, **self.layout.put_batch(of_block)}


def compared_arrays(config: ModelConfig, params: Params) -> set[str]:
    """Names of the arrays of videos that a model compares."""
    definition = model_definition(config)
    frame_feat = jax.ShapeDtypeStruct((1, 1, config.backbone.embed_dim), np.float32)
    frame_mask = jax.ShapeDtypeStruct((1, 1), bool)

    def encode(params: Params, frame_feat: jax.Array, frame_mask: jax.Array) -> Features:
        interaction = nnx.merge(definition, params).interaction
        return interaction.encode_video(frame_feat, frame_mask)

    return set(jax.eval_shape(encode, params, frame_feat, frame_mask))


class SearchEngine:
    """Compares queries with galleries; compiles once per shape."""

    def __init__(self, config: ModelConfig, params: Params):
        self._config, self._params = config, params
        self._steps: dict[tuple[int, int, str | None], Callable] = {}

    def search(
        self,
        text: Features,
        gallery: Gallery,
        top: int,
        weights: Sequence[float] | str | None = None,
    ) -> Ranking:
        """Finds the best windows for each of Q queries, or for a sum of them.

        Args:
          text: arrays of Q texts, with features and mask of their tokens (`encode_text`), or of
            videos in the place of texts (`Interaction.video_as_text`).
          gallery: the windows.
          top: number of windows per query.
          weights: Q numbers: ranks by the weighted sum of the Q similarities, as one query. BEST:
            by the largest of them, as one query. None: each query on its own.
        """
        count = len(next(iter(text.values())))
        top = min(top, gallery.size)
        # Few shapes: the numbers of queries and of hits are rounded up to powers of two.
        padded = 1 << (count - 1).bit_length()
        rows = np.minimum(np.arange(padded), count - 1)
        text = {name: array[rows] for name, array in _without_padding(text).items()}
        text = jax.device_put(text, gallery.layout.replicated)
        rounded = min(1 << (top - 1).bit_length(), gallery.block)
        # A query that is repeated to fill the batch does not change the largest similarity.
        combined = weights if weights in (None, BEST) else "sum"
        step = self._step(gallery, rounded, combined)
        if combined == "sum":
            factors = np.pad(np.asarray(weights, np.float32), (0, padded - count))
            text = {**text, _WEIGHTS: jax.device_put(factors, gallery.layout.replicated)}
        if combined is not None:
            count = 1
        scores = np.full((count, 0), -np.inf, np.float32)
        slots = np.zeros((count, 0), np.int64)
        pending = []  # The next block is read while this one is compared.
        for first_slot, arrays in gallery.blocks():
            pending.append((first_slot, step(self._params, text, arrays)))
            if len(pending) > 1:
                scores, slots = _merge(scores, slots, pending.pop(0), count, top)
        for block in pending:
            scores, slots = _merge(scores, slots, block, count, top)
        return Ranking(scores, slots)

    def _step(self, gallery: Gallery, top: int, combined: str | None) -> Callable:
        """Compiled function: the best `top` of each device's shard of a block, concatenated."""
        layout, share = gallery.layout, gallery.block // gallery.layout.device_count
        if (share, top, combined) not in self._steps:
            definition = model_definition(self._config)
            local_top = min(top, share)

            def compare(params, text, arrays):
                arrays, text = dict(arrays), dict(text)
                valid, weights = arrays.pop("valid"), text.pop(_WEIGHTS, None)
                bias = arrays.pop(_BIAS, None)
                interaction = nnx.merge(definition, params).interaction
                sim = similarity_in_blocks(
                    lambda part, _: interaction.similarity(text, dequantize(part)),
                    arrays,
                    None,
                    _COMPARED,
                )
                if combined == "sum":
                    sim = weights[None] @ sim
                elif combined == BEST:
                    sim = sim.max(axis=0, keepdims=True)
                if bias is not None:
                    sim = sim - bias
                sim = jnp.where(valid, sim, -jnp.inf)
                scores, slots = jax.lax.top_k(sim, local_top)  # [Q, k]
                return scores, slots + share * jax.lax.axis_index(AXIS)

            replicated, rows = PartitionSpec(), PartitionSpec(AXIS)
            columns = PartitionSpec(None, AXIS)
            compare_shards = jax.shard_map(
                compare,
                mesh=layout.mesh,
                in_specs=(replicated, replicated, rows),
                out_specs=(columns, columns),
                check_vma=False,
            )
            self._steps[share, top, combined] = jax.jit(
                layout.on_mesh(compare_shards, self._config.dtype)
            )
        return self._steps[share, top, combined]


def _without_padding(text: Features) -> Features:
    """Truncates the tokens to the longest query, rounded up to a multiple of eight.

    One padded token is kept where there is one: its similarity, 0, takes part in the maxima of
    token-wise interactions (see `weighted_token_wise`).
    """
    longest = int(text["text_mask"].sum(axis=1).max())
    length = min(-(-(longest + 1) // 8) * 8, text["text_mask"].shape[1])
    # Arrays of tokens, [Q, L, ...], are named `text_*`; those of whole sentences are not.
    return {
        name: array[:, :length] if name.startswith("text_") else array
        for name, array in text.items()
    }


def _merge(
    scores: np.ndarray, slots: np.ndarray, block: tuple, count: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the best so far with those of another block; equal scores are ordered by slot."""
    offset, found = block
    new_scores, new_slots = (np.asarray(array)[:count] for array in found)
    scores = np.concatenate([scores, new_scores], axis=1)
    # Slots of a block are int32, those of an index int64.
    slots = np.concatenate([slots, new_slots.astype(np.int64) + offset], axis=1)
    order = np.lexsort((slots, -scores), axis=1)[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(slots, order, 1)
