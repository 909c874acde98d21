"""Exact search: every indexed video is compared with the query, by the model's own interaction.

Videos go through the devices in blocks of one shape, split over them; each device finds the best of
its share, and only those are merged.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from drl_jax.config import ModelConfig
from drl_jax.models.drl import Params, model_definition
from drl_jax.models.interaction import Features, over_video_blocks
from drl_jax.sharding import AXIS, Layout

# Videos of a block, over all devices.
BLOCK = 16384
# Videos that a device compares at a time: their features, as float32, stay in its caches.
_COMPARED = 128


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best videos of each query.

    Attributes:
      scores: float32 [Q, k], descending; k is smaller than asked for in a small gallery.
      slots: int [Q, k], rows of the gallery's arrays.
    """

    scores: np.ndarray
    slots: np.ndarray


class Gallery:
    """Stored arrays of videos, in blocks of consecutive slots, split over the devices.

    Where the blocks fit, they stay on the devices after the first query. On a CPU nothing is
    copied: a block is the memory map itself.
    """

    def __init__(
        self, arrays: Features, slots: Sequence[int], layout: Layout, *, block: int = BLOCK
    ):
        """Reads nothing yet.

        Args:
          arrays: stored arrays (`store.stored_arrays`), a row a slot; memory maps will do.
          slots: int [V], the rows that are videos.
          layout: over which devices.
          block: slots that are compared at a time.
        """
        end = max(slots) + 1
        self.size = len(slots)
        self.layout = layout
        share = -(-min(block, end) // layout.devices)
        if share > _COMPARED:  # no remainder, for which all of the block would be copied
            share = -(-share // _COMPARED) * _COMPARED
        self.block = share * layout.devices
        self._arrays = {name: array[:end] for name, array in arrays.items()}
        self._valid = np.zeros(end, bool)
        self._valid[np.asarray(slots)] = True
        self._kept: list[dict[str, jax.Array]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a query has to read."""
        return sum(array.nbytes for array in self._arrays.values())

    def only(self, slots: Sequence[int]) -> "Gallery":
        """Some videos, copied out of the rest; slot n of it is the n-th of `slots`."""
        rows = np.asarray(slots)
        arrays = {name: array[rows] for name, array in self._arrays.items()}
        return Gallery(arrays, range(len(rows)), self.layout, block=self.block)

    def blocks(self) -> Iterator[dict[str, jax.Array]]:
        """The arrays of each block, and `valid`, which of its slots are videos."""
        if self._kept is not None:
            yield from self._kept
            return
        kept = [] if self._fits() else None
        for block in self._read():
            if kept is not None:
                kept.append(block)
            yield block
        self._kept = kept

    def _read(self) -> Iterator[dict[str, jax.Array]]:
        arrays = {**self._arrays, "valid": self._valid}
        for start in range(0, len(self._valid), self.block):
            part = {name: array[start : start + self.block] for name, array in arrays.items()}
            missing = self.block - len(part["valid"])
            if missing:
                part = {
                    name: np.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1)))
                    for name, array in part.items()
                }
            yield self.layout.put_rows(part)

    def _fits(self) -> bool:
        """Whether all blocks together leave the devices half of their free memory."""
        stats = jax.local_devices()[0].memory_stats()
        if not stats:
            return True  # a CPU, whose memory maps cost nothing
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        return self.nbytes / self.layout.devices < free / 2


class SearchEngine:
    """Compares queries with galleries."""

    def __init__(self, config: ModelConfig, params: Params):
        self._config, self._params = config, params
        self._steps: dict[tuple[int, int], Callable] = {}

    def search(self, text: Features, gallery: Gallery, top: int) -> Ranking:
        """The best videos for each of Q queries.

        Args:
          text: the arrays of `DRL.encode_text`; also of `video_as_query`.
          gallery: where to search.
          top: how many.
        """
        count = len(next(iter(text.values())))
        top = min(top, gallery.size)
        # A few shapes instead of one for every number of queries.
        padded = 1 << (count - 1).bit_length()
        rows = np.minimum(np.arange(padded), count - 1)
        text = {name: array[rows] for name, array in _without_padding(text).items()}
        text = jax.device_put(text, gallery.layout.whole)
        step = self._step(gallery, min(top, gallery.block))
        scores = np.full((count, 0), -np.inf, np.float32)
        slots = np.zeros((count, 0), np.int64)
        pending = []  # the next block is read while this one is compared
        for number, arrays in enumerate(gallery.blocks()):
            pending.append((number * gallery.block, step(self._params, text, arrays)))
            if len(pending) > 1:
                scores, slots = _merge(scores, slots, pending.pop(0), count, top)
        for block in pending:
            scores, slots = _merge(scores, slots, block, count, top)
        return Ranking(scores, slots)

    def _step(self, gallery: Gallery, top: int) -> Callable:
        """Compiled: the best `top` of each device's share of a block, side by side."""
        layout, share = gallery.layout, gallery.block // gallery.layout.devices
        if (share, top) not in self._steps:
            definition = model_definition(self._config)
            local_top = min(top, share)

            def compare(params, text, arrays):
                arrays = dict(arrays)
                valid = arrays.pop("valid")
                interaction = nnx.merge(definition, params).interaction
                sim = over_video_blocks(
                    lambda part, _: interaction.similarity(text, restored(part)),
                    arrays,
                    None,
                    _COMPARED,
                )
                sim = jnp.where(valid, sim, -jnp.inf)
                scores, places = jax.lax.top_k(sim, local_top)  # [Q, k]
                return scores, places + share * jax.lax.axis_index(AXIS)

            whole, rows, columns = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
            self._steps[share, top] = jax.jit(
                jax.shard_map(
                    compare,
                    mesh=layout.mesh,
                    in_specs=(whole, whole, rows),
                    out_specs=(columns, columns),
                    check_vma=False,
                )
            )
        return self._steps[share, top]


def restored(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Stored arrays (`store.stored_arrays`) as the interaction takes them, features float32."""
    features = {}
    for name, array in arrays.items():
        if name.endswith(".scale"):
            continue
        if array.dtype == jnp.uint16:
            # bfloat16 is the upper half of a float32. XLA's own conversion, and any slice of a
            # bfloat16 array, is ten times slower than this on a CPU.
            bits = jnp.asarray(array).astype(jnp.uint32) << 16
            array = jax.lax.bitcast_convert_type(bits, jnp.float32)
        elif array.dtype == jnp.int8:
            array = array.astype(jnp.float32) * arrays[f"{name}.scale"][..., None]
        features[name] = array
    return features


def _without_padding(text: Features) -> Features:
    """Cuts what is beyond the longest query, in steps of eight: it need not be compared.

    One padded word stays, where there was one: its similarity, 0, is one of those of which the
    interaction takes the largest (see `weighted_token_wise`).
    """
    longest = int(text["text_mask"].sum(axis=1).max())
    length = min(-(-(longest + 1) // 8) * 8, text["text_mask"].shape[1])
    words = ("text_feat", "text_mask", "text_weight")
    return {name: array[:, :length] if name in words else array for name, array in text.items()}


def _merge(
    scores: np.ndarray, slots: np.ndarray, block: tuple, count: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best so far, with those of another block; among equals the earlier video is first."""
    offset, found = block
    new_scores, new_slots = (np.asarray(array)[:count] for array in found)
    scores = np.concatenate([scores, new_scores], axis=1)
    slots = np.concatenate([slots, new_slots + offset], axis=1)
    order = np.lexsort((slots, -scores), axis=1)[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(slots, order, 1)


def video_as_query(video: Features) -> Features:
    """Videos in the place of texts: frames take the part of words, and their weights that of words.

    Args:
      video: the arrays of `DRL.encode_frames`, with `frame_feat` and `frame_mask`.

    Returns:
      Arrays as of `DRL.encode_text`. A video's sentence is the mean of its unit frames.
    """
    feat, mask = video["frame_feat"], video["frame_mask"]
    query = {"text_feat": feat, "text_mask": mask}
    if "frame_weight" in video:
        return {**query, "text_weight": video["frame_weight"]}
    unit = feat / np.maximum(np.linalg.norm(feat, axis=-1, keepdims=True), 1e-12)
    mean = (unit * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return {**query, "sentence_feat": video.get("video_feat", mean)}
