"""Search without a run or videos on disk: random models, and indexes of made-up videos."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import numpy as np

from drl_jax.config import Config
from drl_jax.evaluation.embedder import Embedder
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.reranker import RerankerConfig, init_reranker
from drl_jax.pretrained.model import RetrievalModel
from drl_jax.runtime.sharding import make_layout
from drl_jax.search.encoding import BANK_ARRAY, quantize
from drl_jax.search.index_file import IndexPart, IndexWriter
from drl_jax.search.reading import strip_arrays
from drl_jax.search.segments import VideoRecord
from support.params import random_params


def random_model(config: Config, interaction: str) -> RetrievalModel:
    """A model with an interaction; positions are large, so that the order of frames matters."""
    model = dataclasses.replace(config.model, interaction=interaction)
    config = dataclasses.replace(config, model=model)
    layout = make_layout()
    params = jax.device_put(random_params(model, position_std=1.0), layout.replicated)
    embedder = Embedder(config, layout, keep_tokens=True)
    return RetrievalModel(config, params, layout, {"weights": interaction}, "", embedder)


def made_up_windows(model: RetrievalModel, count: int, seed: int = 0) -> Features:
    """Random arrays of windows of 1 to `max_frames` frames, as of `encode_videos` (wti)."""
    rng, frames = np.random.default_rng(seed), model.config.data.max_frames
    mask = np.arange(frames) < rng.integers(1, frames + 1, (count, 1))
    unit = rng.normal(size=(count, frames, model.config.model.backbone.embed_dim))
    weight = rng.random((count, frames)) * mask
    return {
        "frame_unit": (unit / np.linalg.norm(unit, axis=2, keepdims=True)).astype(np.float32),
        "frame_mask": mask,
        "frame_weight": (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32),
    }


def random_reranker(
    model: RetrievalModel, sizes: RerankerConfig, *, trained: bool = True
) -> Params:
    """Parameters of a reranker of a model; those that are not trained change nothing."""
    text = model.encode_text([f"shape {n} moves" for n in range(12)])
    key = jax.random.key(1)
    params = init_reranker(sizes, model.params, text, made_up_windows(model, 12), key)
    if trained:
        shape = params["frames_out"].shape
        params["frames_out"] = 0.01 * jax.random.normal(jax.random.key(2), shape)
    return jax.device_get(params)


def made_up_videos(
    model: RetrievalModel, paths: Sequence[str], windows: Features, storage: str = "float32"
) -> list[VideoRecord]:
    """What an index stores of videos of one window each; their files have the size 9 and time 9."""
    vectors = {"pooled_unit": model.interaction.video_vectors(windows)}
    rows = {**quantize(windows, storage), **quantize(vectors, "int8")}
    rows["span"] = np.tile([0.0, 2.0], (len(paths), 1))
    rows["frames"] = np.tile(
        np.arange(windows["frame_mask"].shape[1], dtype=np.int32), (len(paths), 1)
    )
    rows[BANK_ARRAY] = np.tile(np.float32([0, 1]), (len(paths), 1))
    of_file = {
        "frame.time": np.linspace(0, 2, windows["frame_mask"].shape[1]),
        "frame.hash": np.zeros(windows["frame_mask"].shape[1], np.uint64),
        "feature.image_feat": np.zeros((0, windows["frame_unit"].shape[2]), np.uint16),
        **strip_arrays([b"jpeg"]),
    }
    return [
        VideoRecord(
            *(path, 9, 9, f"{number:015x}{0:049x}"),
            duration=2.0,
            arrays={**{f"window.{name}": rows[name][[number]] for name in rows}, **of_file},
        )
        for number, path in enumerate(paths)
    ]


def write_index(
    directory: Path, model: RetrievalModel, segments: Iterable[Sequence[VideoRecord]], **about
) -> Path:
    """Writes an index with one segment for each list of videos."""
    given = {
        **{"source": model.source, "fingerprint": model.fingerprint, "videos": str(directory)},
        **{"storage": "float32", "fps": 1.0, "bank": ["a"]},
    }
    with IndexWriter(directory) as writer:
        writer.update_header(**{**given, **about})
        for videos in segments:
            writer.put(videos)
    return directory


def damage(index: Path, *paths: str) -> None:
    """Changes features of videos in place, as a failing disk or another program would."""
    for segment in (one.segment for one in IndexPart(index).listed):
        for row in (row for path in paths if (row := segment.find(path)) is not None):
            array = segment.arrays["window.frame_unit"]
            with (segment.directory / "window.frame_unit.bin").open("r+b") as file:
                file.seek(int(segment.firsts["window"][row]) * array[0].nbytes)
                file.write(bytes(array[0].nbytes))
