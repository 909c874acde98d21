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
from drl_jax.search.quantization import dequantize
from drl_jax.sharding import AXIS, Layout

# Videos per block, on all devices together.
BLOCK = 16384
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
        self, arrays: Features, slots: Sequence[int], layout: Layout, *, block: int = BLOCK
    ):
        """Creates a gallery; nothing is read before the first query.

        Args:
          arrays: stored arrays (`quantization.quantize`), one row per slot; may be memory maps.
          slots: int [V], the rows that are videos.
          layout: mesh and shardings.
          block: slots per block.
        """
        end = int(np.max(slots)) + 1
        share = -(-min(block, end) // layout.device_count)
        if share > _COMPARED:
            # Without a remainder: for one, `similarity_in_blocks` would copy the whole block.
            share = -(-share // _COMPARED) * _COMPARED
        else:
            # Few shapes: a growing index is compiled for a few times.
            share = 1 << (share - 1).bit_length()
        self.layout, self.block = layout, share * layout.device_count
        used = {name: array[:end] for name, array in arrays.items()}
        self._blocks = _Blocks(used, self.block, layout)
        self._biases: np.ndarray | None = None
        self._choose(slots)

    def _choose(self, slots: Sequence[int]) -> None:
        self.size = len(slots)
        self._valid = np.zeros(self._blocks.end, bool)
        self._valid[np.asarray(slots)] = True

    @property
    def nbytes(self) -> int:
        """Bytes that a query reads."""
        return self._blocks.nbytes

    def only(self, slots: Sequence[int]) -> "Gallery":
        """A gallery of some of the videos, with the same slots; shares the blocks."""
        gallery = copy.copy(self)
        gallery._choose(slots)
        return gallery

    def with_biases(self, biases: np.ndarray) -> "Gallery":
        """A gallery of the same videos that ranks by similarity minus bias, and scores by it.

        Args:
          biases: float32 [S], one per slot.
        """
        gallery = copy.copy(self)
        gallery._biases = biases
        return gallery

    def copied(self, slots: Sequence[int]) -> "Gallery":
        """A gallery with copies of some videos; its slot n is the n-th of `slots`."""
        rows = np.asarray(slots)
        arrays = {name: array[rows] for name, array in self._blocks.arrays.items()}
        gallery = Gallery(arrays, range(len(rows)), self.layout, block=self.block)
        return gallery if self._biases is None else gallery.with_biases(self._biases[rows])

    def blocks(self) -> Iterator[dict[str, jax.Array]]:
        """Yields the arrays of each block, with `valid`: which of its slots are videos.

        And with their biases, if the gallery has some.
        """
        rows = {"valid": self._valid}
        if self._biases is not None:
            rows[_BIAS] = self._biases[: self._blocks.end]
        for start, arrays in self._blocks.read():
            parts = {name: row[start : start + self.block] for name, row in rows.items()}
            padded = {n: np.pad(part, (0, self.block - len(part))) for n, part in parts.items()}
            yield {**arrays, **self.layout.put_batch(padded)}


class _Blocks:
    """Stored arrays in blocks.

    They stay on the devices after the first query if they fit. On a CPU nothing is copied: a block
    is the memory map itself.
    """

    def __init__(self, arrays: Features, size: int, layout: Layout):
        self.arrays, self.size, self.layout = arrays, size, layout
        self.end = len(next(iter(arrays.values())))
        self._kept: list[tuple[int, dict[str, jax.Array]]] | None = None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def read(self) -> Iterator[tuple[int, dict[str, jax.Array]]]:
        """Yields the first slot and the arrays of each block; the last one is padded."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = [] if self._fits() else None
        for start in range(0, self.end, self.size):
            block = start, self.layout.put_batch(self._padded(start))
            if kept is not None:
                kept.append(block)
            yield block
        self._kept = kept

    def _padded(self, start: int) -> Features:
        part = {name: array[start : start + self.size] for name, array in self.arrays.items()}
        missing = self.size - min(self.size, self.end - start)
        if not missing:
            return part
        return {
            name: np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
            for name, array in part.items()
        }

    def _fits(self) -> bool:
        """Whether all blocks together take less than half of the devices' free memory."""
        stats = jax.local_devices()[0].memory_stats()
        if not stats:
            return True  # A CPU: memory maps take no memory.
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        return self.nbytes / self.layout.device_count < free / 2


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
        for number, arrays in enumerate(gallery.blocks()):
            pending.append((number * gallery.block, step(self._params, text, arrays)))
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
            self._steps[share, top, combined] = jax.jit(
                jax.shard_map(
                    compare,
                    mesh=layout.mesh,
                    in_specs=(replicated, replicated, rows),
                    out_specs=(columns, columns),
                    check_vma=False,
                )
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
    slots = np.concatenate([slots, new_slots + offset], axis=1)
    order = np.lexsort((slots, -scores), axis=1)[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(slots, order, 1)
