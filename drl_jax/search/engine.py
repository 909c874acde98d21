"""Compares queries with the windows of an index, by the model's own interaction or by one vector.

Windows are compared in blocks of few shapes, sharded over the devices. Each device returns the best
of its shard, and only these are merged.
"""

import concurrent.futures
import copy
import functools
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
from drl_jax.runtime.sharding import AXIS, Layout
from drl_jax.search.encoding import dequantize

# Windows of a block, on all devices together: of large runs, and of others. Smaller runs are copied
# together.
BLOCKS = (16384, 2048)
# Arrays of one vector a window, for `SearchEngine.scan`.
VECTORS = ("pooled_unit", "pooled_unit.scale")
# Windows that a device compares at a time: their features, as float32, fit in its caches.
_COMPARED = 128


# A score is the weighted sum of all parts, which keep their lengths: padding is compared too.
class Part(NamedTuple):
    """A part of a query: arrays of texts, of which the most similar counts, and its weight."""

    text: Features
    weight: float = 1.0


class Ranking(NamedTuple):
    """The best windows of a query by score, float [k], then by slot, int64 [k]."""

    scores: np.ndarray
    slots: np.ndarray


class Gallery:
    """Stored arrays of windows. A slot is the number of a window among those of all parts.

    `valid`, bool [all slots], are those that count; `biases`, float32, are subtracted if given.
    """

    def __init__(self, parts: Sequence[Features], layout: Layout, order: np.ndarray | None = None):
        """Copies small parts together; others, which may be memory maps, are read at each query.

        `order`: slots of the windows of small parts, of which the first of equal scores counts.
        """
        counts = np.array([len(next(iter(part.values()), ())) for part in parts], int)
        self.layout, self._parts = layout, parts
        self._firsts = np.concatenate([[0], np.cumsum(counts)])
        self.valid, self.biases = np.ones(self._firsts[-1], bool), None
        is_small = counts < BLOCKS[-1]
        small = np.flatnonzero(np.repeat(is_small, counts)) if order is None else order
        # Windows one after the other in memory, and their slots.
        self._runs = [
            *((parts[n], np.arange(*self._firsts[n : n + 2])) for n in np.flatnonzero(~is_small)),
            (self.take(small), small),
        ]

    def __len__(self) -> int:
        return int(self.valid.sum())

    def only(self, valid: np.ndarray, biases: np.ndarray | None = None) -> "Gallery":
        """A gallery of which some windows count, ranked by similarity minus bias: [all slots]."""
        gallery = copy.copy(self)
        gallery.valid, gallery.biases = valid, biases
        return gallery

    def copied(self, slots: np.ndarray) -> "Gallery":
        """A gallery of copies of some windows, in their order, with their slots."""
        gallery = copy.copy(self)
        gallery._runs = [(self.take(slots), slots)]
        return gallery

    def take(self, slots: np.ndarray) -> Features:
        """Copies of the stored arrays of some windows, [N, ...]."""
        parts = np.searchsorted(self._firsts, slots, side="right") - 1
        taken: Features = {}
        for part in np.unique(parts).tolist():
            places = np.flatnonzero(parts == part)
            for name, array in self._parts[part].items():
                if name not in taken:
                    taken[name] = np.empty((len(slots), *array.shape[1:]), array.dtype)
                taken[name][places] = array[slots[places] - self._firsts[part]]
        return taken

    def blocks(self, *, vectors: bool = False) -> Iterator[tuple[np.ndarray, Features]]:
        """Yields the slots of each block and its arrays, or VECTORS, with `valid` and `bias`.

        On a CPU a block is the memory map itself, not a copy; so the last block of a run begins
        before the end of the one before.
        """
        for stored, all_slots in self._runs:
            size = _block_size(len(all_slots), self.layout.device_count)
            for start in range(0, len(all_slots), size):
                first = max(0, min(start, len(all_slots) - size))
                rows = slice(first, first + size)
                slots = all_slots[rows]
                arrays = {n: a[rows] for n, a in stored.items() if (n in VECTORS) == vectors}
                arrays["valid"] = self.valid[slots]
                arrays["valid"][: start - first] = False
                if self.biases is not None:
                    arrays["bias"] = self.biases[slots]
                if missing := size - len(slots):
                    arrays = {
                        name: np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)])
                        for name, array in arrays.items()
                    }
                yield slots, arrays


def _block_size(count: int, devices: int) -> int:
    """Windows of a run that are compared by one call; few shapes, so that few are compiled."""
    size = next((size for size in BLOCKS if count >= size), 1 << (count - 1).bit_length())
    share = -(-size // devices)
    return devices * (share if share <= _COMPARED else -(-share // _COMPARED) * _COMPARED)


class SearchEngine:
    """Compares queries with galleries of one layout; compiles once per shape."""

    def __init__(self, config: ModelConfig, params: Params):
        self._config, self._params = config, params
        self._step = functools.cache(self._compiled)

    def search(
        self, parts: Sequence[Part], gallery: Gallery, top: int, *, is_one: bool = True
    ) -> list[Ranking]:
        """The `top` best windows of each query, and all with the score of the last of them.

        The parts are one query; or, unless `is_one`, one part whose Q texts are queries each.
        """
        count = 1 if is_one else len(parts[0].text["text_mask"])
        top = min(top, len(gallery))
        if not top:
            return [Ranking(np.zeros(0, np.float32), np.zeros(0, np.int64))] * count
        texts = jax.device_put([_padded(part.text) for part in parts], gallery.layout.replicated)
        weights = np.array([part.weight for part in parts], np.float32)
        found = []
        for slots, arrays in gallery.blocks():
            # Few shapes: the number of hits is rounded up to a power of two.
            most = min(1 << (top - 1).bit_length(), len(arrays["valid"]))
            step = self._step(gallery.layout, len(arrays["valid"]), most, is_one)
            best = step(self._params, texts, weights, gallery.layout.put_batch(arrays))
            found.append((slots, *best))
            if len(found) > 1:  # The next block is read while this one is compared.
                jax.block_until_ready(found[-2])
        scores = np.concatenate([np.asarray(scores) for _, scores, _ in found], axis=1)
        places = [slots[np.minimum(np.asarray(rows), len(slots) - 1)] for slots, _, rows in found]
        slots = np.concatenate(places, axis=1)
        return [_best(*query, top) for query in zip(scores[:count], slots[:count], strict=True)]

    def _compiled(self, layout: Layout, block: int, top: int, is_one: bool) -> Callable:
        """The best `top` of each device's shard of a block, concatenated."""
        definition, share = model_definition(self._config), block // layout.device_count

        def compare(params, texts, weights, arrays):
            arrays = dict(arrays)
            valid, bias = arrays.pop("valid"), arrays.pop("bias", None)
            interaction = nnx.merge(definition, params).interaction

            def similarities(block, _):
                videos = dequantize(block)
                return jnp.concatenate([interaction.similarity(text, videos) for text in texts])

            sim = similarity_in_blocks(similarities, arrays, None, _COMPARED)
            if is_one:
                ends = np.cumsum([len(text["text_mask"]) for text in texts])
                of_parts = [part.max(axis=0) for part in jnp.split(sim, ends[:-1])]
                sim = sum(w * part for w, part in zip(weights, of_parts, strict=True))[None]
            if bias is not None:
                sim = sim - bias
            sim = jnp.where(valid, sim, -jnp.inf)
            scores, rows = jax.lax.top_k(sim, min(top, share))  # [Q, k]
            return scores, rows + share * jax.lax.axis_index(AXIS)

        replicated, columns = PartitionSpec(), PartitionSpec(None, AXIS)
        specs = {
            "in_specs": (replicated, replicated, replicated, PartitionSpec(AXIS)),
            "out_specs": (columns, columns),
        }
        of_shards = jax.shard_map(compare, mesh=layout.mesh, check_vma=False, **specs)
        return jax.jit(layout.on_mesh(of_shards, self._config.dtype))

    def scan(self, vectors: np.ndarray, gallery: Gallery, count: int) -> list[np.ndarray]:
        """The slots of the largest dot products with vectors, float32 [Q, D], ascending."""
        padded = vectors[_power_of_two(len(vectors))]

        def compare(block: tuple[np.ndarray, Features]) -> tuple[np.ndarray, np.ndarray]:
            slots, arrays = block
            dots = _dot(*(arrays[name] for name in VECTORS), padded)
            scores = np.array(dots[: len(vectors)])
            if "bias" in arrays:
                scores -= arrays["bias"]
            scores[:, ~arrays["valid"]] = -np.inf
            return scores[:, : len(slots)], slots

        count = min(count, len(gallery))
        if not count:
            return [np.zeros(0, np.int64)] * len(vectors)
        # One thread computes a block: XLA does not split this product.
        with concurrent.futures.ThreadPoolExecutor(available_cpus()) as pool:
            scores, slots = zip(*pool.map(compare, gallery.blocks(vectors=True)), strict=True)
        all_slots = np.concatenate(slots)
        of_vectors = np.concatenate(scores, axis=1)
        best = (np.argpartition(-row, count - 1)[:count] for row in of_vectors)
        return [np.sort(all_slots[row]) for row in best]


@jax.jit
def _dot(rows: jax.Array, scale: jax.Array, vectors: jax.Array) -> jax.Array:
    """int8 [B, D], float32 [B] and [Q, D] -> [Q, B]."""
    rows = rows.astype(jnp.float32)
    if len(vectors) == 1:  # Not converted in memory.
        return (jnp.sum(rows * vectors[0], axis=1) * scale)[None]
    return jnp.matmul(vectors, rows.T, precision="highest") * scale


def _power_of_two(count: int) -> np.ndarray:
    """Numbers below `count`, the last one again up to a power of two: few shapes are compiled."""
    return np.minimum(np.arange(1 << (count - 1).bit_length()), count - 1)


def _padded(text: Features) -> Features:
    """Rounds texts up to a power of two, and tokens to the longest text and a multiple of eight."""
    mask = text["text_mask"]
    rows = _power_of_two(len(mask))
    # One padded token is kept where there is one: its similarity, 0, takes part in the maxima of
    # token-wise interactions (see `weighted_token_wise`).
    length = min(-(-(int(mask.sum(axis=1).max()) + 1) // 8) * 8, mask.shape[1])
    # Arrays of tokens, [Q, L, ...], are named `text_*`; those of whole sentences are not.
    return {
        name: (array[:, :length] if name.startswith("text_") else array)[rows]
        for name, array in text.items()
    }


def _best(scores: np.ndarray, slots: np.ndarray, top: int) -> Ranking:
    """The best of all blocks, and all with the score of the last of them."""
    order = np.lexsort((slots, -scores))
    last = scores[order[min(top, len(order)) - 1]]
    kept = order[(scores[order] >= last) & (scores[order] > -np.inf)]
    return Ranking(scores[kept], slots[kept])
