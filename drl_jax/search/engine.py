"""Exact search: every indexed video is compared with the query, by the model's own interaction.

Videos go through the devices in blocks of one shape, split over them; each device finds the best of
its share, and only those are merged.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from drl_jax.embedding import Features
from drl_jax.models.drl import model_definition
from drl_jax.search.model import SearchModel
from drl_jax.sharding import AXIS, Layout

# Videos of a block, over all devices.
BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The best videos of each query.

    Attributes:
      scores: float32 [Q, k], descending; k is smaller than asked for in a small gallery.
      rows: int [Q, k], rows of the gallery.
    """

    scores: np.ndarray
    rows: np.ndarray


class Gallery:
    """Stored arrays of videos, in blocks on the devices or fed to them from the disk."""

    def __init__(self, arrays: Features, rows: np.ndarray, layout: Layout, *, block: int = BLOCK):
        """Puts nothing on the devices yet.

        Args:
          arrays: stored arrays (`store.stored_arrays`), a row a slot; memory maps will do.
          rows: int [V], the rows to search.
          layout: over which devices.
          block: videos that are compared at a time.
        """
        devices = layout.devices
        self.rows = np.asarray(rows, np.int64)
        self.layout = layout
        size = min(block, max(1, len(self.rows)))
        self.block = -(-size // devices) * devices
        self._arrays = arrays
        self._resident: list[tuple[dict, jax.Array]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that a query has to read."""
        return sum(array[:1].nbytes * len(self.rows) for array in self._arrays.values())

    def keep_on_devices(self) -> None:
        """Reads all blocks once and keeps them; queries then read nothing."""
        self._resident = list(self._read())

    def blocks(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        """Each block's arrays and which of its rows are videos, split over the devices by rows."""
        return iter(self._resident) if self._resident is not None else self._read()

    def _read(self) -> Iterator[tuple[dict[str, jax.Array], jax.Array]]:
        for start in range(0, len(self.rows), self.block):
            picked = self.rows[start : start + self.block]
            padded = np.pad(picked, (0, self.block - len(picked)), mode="edge")
            arrays = {name: array[padded] for name, array in self._arrays.items()}
            valid = np.arange(self.block) < len(picked)
            placed = self.layout.put_rows({**arrays, "valid": valid})
            yield placed, placed.pop("valid")


class SearchEngine:
    """Compares queries with a gallery."""

    def __init__(self, model: SearchModel, gallery: Gallery):
        self._model, self._gallery = model, gallery
        self._steps: dict[int, Callable] = {}

    def search(self, text: Features, top: int) -> Ranking:
        """The best videos for each of Q queries.

        Args:
          text: the arrays of `DRL.encode_text`; also of `video_as_query`.
          top: how many.
        """
        gallery = self._gallery
        count = len(next(iter(text.values())))
        top = min(top, len(gallery.rows))
        # A few shapes instead of one for every number of queries.
        padded = 1 << (count - 1).bit_length()
        rows = np.minimum(np.arange(padded), count - 1)
        text = {name: array[rows] for name, array in _without_padding(text).items()}
        text = jax.device_put(text, gallery.layout.whole)
        scores = np.full((count, 0), -np.inf, np.float32)
        places = np.zeros((count, 0), np.int64)
        pending = []  # the next block is read while this one is compared
        for number, (arrays, valid) in enumerate(gallery.blocks()):
            found = self._step(min(top, gallery.block))(self._model.params, text, arrays, valid)
            pending.append((number * gallery.block, found))
            if len(pending) > 1:
                scores, places = _merge(scores, places, pending.pop(0), count, top)
        for block in pending:
            scores, places = _merge(scores, places, block, count, top)
        return Ranking(scores, gallery.rows[places])

    def _step(self, top: int) -> Callable:
        """Compiled: the best `top` of each device's share of a block, side by side."""
        if top not in self._steps:
            definition = model_definition(self._model.config.model)
            layout = self._gallery.layout
            share = self._gallery.block // layout.devices
            local_top = min(top, share)

            def compare(params, text, arrays, valid):
                sim = nnx.merge(definition, params).similarity(text, restored(arrays))
                sim = jnp.where(valid, sim, -jnp.inf)
                scores, places = jax.lax.top_k(sim, local_top)  # [Q, k]
                return scores, places + share * jax.lax.axis_index(AXIS)

            whole, rows, columns = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)
            self._steps[top] = jax.jit(
                jax.shard_map(
                    compare,
                    mesh=layout.mesh,
                    in_specs=(whole, whole, rows, rows),
                    out_specs=(columns, columns),
                    check_vma=False,
                )
            )
        return self._steps[top]


def restored(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Stored arrays as the interaction takes them, features float32."""
    features = {}
    for name, array in arrays.items():
        if name.endswith(".scale"):
            continue
        if name.endswith("_feat"):
            array = array.astype(jnp.float32)
            if f"{name}.scale" in arrays:
                array = array * arrays[f"{name}.scale"][..., None]
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
    scores: np.ndarray, places: np.ndarray, block: tuple, count: int, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best so far, with those of another block; among equals the earlier video is first."""
    offset, found = block
    new_scores, new_places = (np.asarray(array)[:count] for array in found)
    scores = np.concatenate([scores, new_scores], axis=1)
    places = np.concatenate([places, new_places + offset], axis=1)
    order = np.lexsort((places, -scores), axis=1)[:, :top]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)


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
