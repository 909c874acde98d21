"""Compares queries with the windows of an index, by the model's own interaction or by one vector.

Windows are compared in blocks of few shapes, sharded over the devices. Each device returns the best
of its shard, and only these are merged.
"""

import concurrent.futures
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, model_definition
from drl_jax.models.interactions import Features
from drl_jax.models.interactions.base import similarity_in_blocks
from drl_jax.runtime.resources import available_cpus
from drl_jax.search.encoding import dequantize
from drl_jax.sharding import AXIS, Layout

# Windows of a block, on all devices together: of large runs, and of others. Smaller runs are copied
# together.
BLOCKS = (16384, 2048)
# Arrays of one vector a window, for `SearchEngine.scan`.
VECTORS = ("pooled_unit", "pooled_unit.scale")
# Windows that a device compares at a time: their features, as float32, fit in its caches.
_COMPARED = 128


class Part(NamedTuple):
    """A part of a query. Parts keep their own lengths: padding takes part in the similarity.

    Attributes:
      text: arrays of Q texts, or of videos in the place of texts (`Interaction.video_as_text`). The
        similarity of the part is the largest of the Q.
      weight: the score is the weighted sum of the similarities of all parts.
    """

    text: Features
    weight: float = 1.0


class Ranking(NamedTuple):
    """The best windows of a query, by score, then by slot.

    Attributes:
      scores: float32 [k].
      slots: int64 [k].
    """

    scores: np.ndarray
    slots: np.ndarray


class _Run(NamedTuple):
    """Windows that lie one after the other in memory.

    Attributes:
      arrays: stored arrays by name, [W, ...]; may be memory maps.
      slots: int64 [W].
      block: windows that are compared by one call; more than W only if W is small.
    """

    arrays: Features
    slots: np.ndarray
    block: int


class Gallery:
    """Stored arrays of windows. A slot is the number of a window among those of all parts."""

    def __init__(self, parts: Sequence[Features], layout: Layout, order: np.ndarray | None = None):
        """Copies small parts together; others are read at each query.

        Args:
          parts: stored arrays (`quantization.quantize`), [W, ...] each; may be memory maps.
          layout: mesh and shardings.
          order: int64 [N], a permutation of the slots of all windows of small parts
            (`small_slots`), in which the first of equal scores counts.
        """
        self.layout, self._parts = layout, parts
        self._firsts = np.concatenate([[0], np.cumsum([_length(part) for part in parts])])
        self._runs = [
            self._run(part, np.arange(first, first + _length(part)))
            for part, first in zip(parts, self._firsts.tolist(), strict=False)
            if _length(part) >= BLOCKS[-1]
        ]
        small = self.small_slots() if order is None else order
        if len(small):
            self._runs.append(self._run(self.take(small), small))
        self.valid = np.ones(int(self._firsts[-1]), bool)
        self.biases: np.ndarray | None = None

    def small_slots(self) -> np.ndarray:
        """int64 [N]: the slots of the windows of small parts."""
        counts = np.diff(self._firsts)
        return np.flatnonzero(np.repeat(counts < BLOCKS[-1], counts))

    def _run(self, arrays: Features, slots: np.ndarray) -> _Run:
        devices = self.layout.device_count
        size = next((size for size in BLOCKS if len(slots) >= size), 0)
        # Few shapes: a growing index is compiled for a few times.
        share = -(-(size or 1 << (len(slots) - 1).bit_length()) // devices)
        if share > _COMPARED:
            share = -(-share // _COMPARED) * _COMPARED
        return _Run(arrays, slots, share * devices)

    def __len__(self) -> int:
        return int(self.valid.sum())

    @property
    def nbytes(self) -> int:
        """Bytes that a query reads."""
        return sum(array.nbytes for part in self._parts for array in part.values())

    def only(self, valid: np.ndarray) -> "Gallery":
        """A gallery of the same slots, of which only some count: bool [all slots]."""
        gallery = copy.copy(self)
        gallery.valid = valid
        return gallery

    def with_biases(self, biases: np.ndarray) -> "Gallery":
        """A gallery that ranks by similarity minus bias, float32 [all slots]."""
        gallery = copy.copy(self)
        gallery.biases = biases
        return gallery

    def take(self, slots: np.ndarray) -> Features:
        """Copies of the stored arrays of some windows, [N, ...]."""
        parts = np.searchsorted(self._firsts, slots, side="right") - 1
        taken: Features = {}
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            rows = slots[places] - self._firsts[part]
            for name, array in self._parts[part].items():
                if name not in taken:
                    taken[name] = np.empty((len(slots), *array.shape[1:]), array.dtype)
                taken[name][places] = array[rows]
        return taken

    def copied(self, slots: np.ndarray) -> "Gallery":
        """A gallery of copies of some windows, in their order, with their slots."""
        gallery = copy.copy(self)
        gallery._runs = [self._run(self.take(slots), slots)] if len(slots) else []
        return gallery

    def blocks(self, *, vectors: bool = False) -> Iterator[tuple[np.ndarray, Features]]:
        """Yields the slots of each block and its arrays, [block, ...], with `valid` and `bias`.

        On a CPU nothing is copied: a block is the memory map itself. So that this is also true of
        the last block of a run, it begins before the end of the one before.

        Args:
          vectors: the arrays VECTORS instead of the others.
        """
        for run in self._runs:
            for start in range(0, len(run.slots), run.block):
                first = max(0, min(start, len(run.slots) - run.block))
                rows = slice(first, first + run.block)
                slots = run.slots[rows]
                valid = self.valid[slots]
                valid[: start - first] = False
                arrays = {
                    name: array[rows]
                    for name, array in run.arrays.items()
                    if (name in VECTORS) == vectors
                }
                arrays["valid"] = valid
                if self.biases is not None:
                    arrays["bias"] = self.biases[slots]
                yield slots, {name: _filled(array, run.block) for name, array in arrays.items()}


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    if len(array) == rows:
        return array
    return np.pad(array, ((0, rows - len(array)), *[(0, 0)] * (array.ndim - 1)))


def _length(part: Features) -> int:
    return len(next(iter(part.values()), ()))


class SearchEngine:
    """Compares queries with galleries; compiles once per shape."""

    def __init__(self, config: ModelConfig, params: Params):
        self._config, self._params = config, params
        self._steps: dict[tuple[int, int, bool], Callable] = {}

    def search(
        self, parts: Sequence[Part], gallery: Gallery, top: int, *, is_one: bool = True
    ) -> list[Ranking]:
        """Finds the best windows.

        Args:
          parts: of one query; or one part, whose Q texts are queries of their own.
          gallery: the windows.
          top: number of windows per query; all windows with the score of the last one are added.
          is_one: whether the parts are one query.
        """
        count = 1 if is_one else len(next(iter(parts[0].text.values())))
        top = min(top, len(gallery))
        if not top:
            return [Ranking(np.zeros(0, np.float32), np.zeros(0, np.int64))] * count
        texts = jax.device_put([_padded(part.text) for part in parts], gallery.layout.replicated)
        weights = np.array([part.weight for part in parts], np.float32)
        found, pending = [], []
        for slots, arrays in gallery.blocks():
            # Few shapes: the number of hits is rounded up to a power of two.
            most = min(1 << (top - 1).bit_length(), len(arrays["valid"]))
            step = self._step(gallery.layout, len(arrays["valid"]), most, is_one)
            result = step(self._params, texts, weights, gallery.layout.put_batch(arrays))
            pending.append((slots, result))
            if len(pending) > 1:  # The next block is read while this one is compared.
                found.append(_fetched(*pending.pop(0), count))
        found += [_fetched(*block, count) for block in pending]
        scores, slots = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
        return [_best(*query, top) for query in zip(scores, slots, strict=True)]

    def _step(self, layout: Layout, block: int, top: int, is_one: bool) -> Callable:
        """Compiled: the best `top` of each device's shard of a block, concatenated."""
        key = (block, top, is_one)
        if key not in self._steps:
            definition, share = model_definition(self._config), block // layout.device_count

            def compare(params, texts, weights, arrays):
                arrays = dict(arrays)
                valid, bias = arrays.pop("valid"), arrays.pop("bias", None)
                interaction = nnx.merge(definition, params).interaction

                def similarities(block, _):
                    videos = dequantize(block)
                    return jnp.concatenate([interaction.similarity(t, videos) for t in texts])

                sim = similarity_in_blocks(similarities, arrays, None, _COMPARED)
                if is_one:
                    ends = np.cumsum([len(jax.tree.leaves(text)[0]) for text in texts])
                    of_parts = [part.max(axis=0) for part in jnp.split(sim, ends[:-1])]
                    sim = sum(w * part for w, part in zip(weights, of_parts, strict=True))[None]
                if bias is not None:
                    sim = sim - bias
                sim = jnp.where(valid, sim, -jnp.inf)
                scores, rows = jax.lax.top_k(sim, min(top, share))  # [Q, k]
                return scores, rows + share * jax.lax.axis_index(AXIS)

            replicated, rows = PartitionSpec(), PartitionSpec(AXIS)
            columns = PartitionSpec(None, AXIS)
            compare_shards = jax.shard_map(
                compare,
                mesh=layout.mesh,
                in_specs=(replicated, replicated, replicated, rows),
                out_specs=(columns, columns),
                check_vma=False,
            )
            self._steps[key] = jax.jit(layout.on_mesh(compare_shards, self._config.dtype))
        return self._steps[key]

    def scan(self, vectors: np.ndarray, gallery: Gallery, count: int) -> list[np.ndarray]:
        """Windows whose stored vectors have the largest dot products with those of queries.

        Args:
          vectors: float32 [Q, D] (`Interaction.query_vectors`).
          gallery: the windows.
          count: number of windows per query.

        Returns:
          int64 [k] for each query, the slots, ascending; k is at most `count`.
        """

        def compare(block: tuple[np.ndarray, Features]) -> tuple[np.ndarray, np.ndarray]:
            slots, arrays = block
            rows, scale = (arrays[name] for name in VECTORS)
            scores = np.array(_dot(rows, scale, vectors))
            if "bias" in arrays:
                scores -= arrays["bias"]
            scores[:, ~arrays["valid"]] = -np.inf
            return scores[:, : len(slots)], slots

        # One thread computes a block: XLA does not split this product.
        with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
            found = list(pool.map(compare, gallery.blocks(vectors=True)))
        scores = np.concatenate([block for block, _ in found], axis=1)
        slots = np.concatenate([block for _, block in found])
        count = min(count, len(gallery))
        if not count:
            return [np.zeros(0, np.int64)] * len(vectors)
        best = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        return [np.sort(slots[row]) for row in best]


@jax.jit
def _dot(rows: jax.Array, scale: jax.Array, vectors: jax.Array) -> jax.Array:
    """int8 [B, D], float32 [B] and [Q, D] -> [Q, B]."""
    rows = rows.astype(jnp.float32)
    if len(vectors) == 1:  # Not converted in memory.
        return (jnp.sum(rows * vectors[0], axis=1) * scale)[None]
    return (vectors @ rows.T) * scale


def _padded(text: Features) -> Features:
    """Rounds texts up to a power of two, and tokens to the longest text and a multiple of eight.

    One padded token is kept where there is one: its similarity, 0, takes part in the maxima of
    token-wise interactions (see `weighted_token_wise`).
    """
    mask = text["text_mask"]
    rows = np.minimum(np.arange(1 << (len(mask) - 1).bit_length()), len(mask) - 1)
    longest = int(mask.sum(axis=1).max())
    length = min(-(-(longest + 1) // 8) * 8, mask.shape[1])
    # Arrays of tokens, [Q, L, ...], are named `text_*`; those of whole sentences are not.
    return {
        name: (array[:, :length] if name.startswith("text_") else array)[rows]
        for name, array in text.items()
    }


def _fetched(slots: np.ndarray, result: tuple, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [Q, k] and slots [Q, k] of a block."""
    scores, rows = (np.asarray(array)[:count] for array in result)
    return scores, slots[np.minimum(rows, len(slots) - 1)]


def _best(scores: np.ndarray, slots: np.ndarray, top: int) -> Ranking:
    """The best of all blocks, and all with the score of the last of them."""
    order = np.lexsort((slots, -scores))
    last = scores[order[min(top, len(order)) - 1]]
    kept = order[(scores[order] >= last) & (scores[order] > -np.inf)]
    return Ranking(scores[kept], slots[kept])
