"""Evaluates models with MTEB (https://github.com/embeddings-benchmark/mteb).

import drl_jax, mteb
from drl_jax.integrations.mteb import LateInteraction

model = LateInteraction(drl_jax.load("runs/msrvtt"))
mteb.evaluate(model, mteb.get_tasks(["MSRVTTT2V", "MSRVTTV2T"]))
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from drl_jax.pretrained.model import RetrievalModel, check_model
from drl_jax.runtime.errors import UserError

try:
    import datasets
    from mteb._create_dataloaders import create_dataloader
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError(f"MTEB is missing ({error}): pip install 'drl_jax[mteb]'") from error


class LateInteraction:
    """A model as MTEB's `SearchProtocol`: ranks by `RetrievalModel.similarity`.

    For retrieval of videos by text, and of texts by video.
    """

    def __init__(self, model: RetrievalModel):
        check_model(model, type(self).__name__)
        self._model = model
        self._kind, self._ids = "", np.array([], str)
        self._corpus: dict[str, np.ndarray] = {}

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """The name is that of the interaction, the revision the fingerprint of the model."""
        return _meta(self._model, "", ScoringFunction.CUSTOM, "late-interaction")

    def index(self, corpus: datasets.Dataset, **options: Any) -> None:
        """Encodes the documents of a task; UserError: they are not texts or videos alone."""
        self._ids = np.array(corpus["id"])
        self._kind, self._corpus = self._encode(corpus, PromptType.document, **options)

    def search(
        self,
        queries: datasets.Dataset,
        *,
        top_k: int,
        top_ranked: dict[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> dict[str, dict[str, float]]:
        """Ranks the documents, or those of `top_ranked`, for each query.

        Returns:
          The similarities of the best `top_k` documents of each query, by their ids.

        Raises:
          UserError: queries and documents are of one kind, or not texts or videos alone.
        """
        kind, asked = self._encode(queries, PromptType.query, **options)
        if kind == self._kind:
            raise UserError(f"MTEB: drl_jax compares texts with videos, not {kind} with {kind}")
        if kind == "text":
            similarity = self._model.similarity(asked, self._corpus)
        else:
            similarity = self._model.similarity(self._corpus, asked).T
        found = {}
        for query, row in zip(queries["id"], similarity, strict=True):
            rows = np.arange(len(self._ids))
            if top_ranked is not None:
                rows = np.flatnonzero(np.isin(self._ids, top_ranked.get(query, [])))
            best = rows[np.argsort(-row[rows], kind="stable")[:top_k]]
            found[query] = dict(zip(self._ids[best].tolist(), row[best].tolist(), strict=True))
        return found

    def _encode(
        self, rows: datasets.Dataset, side: PromptType, **options: Any
    ) -> tuple[str, dict[str, np.ndarray]]:
        """As MTEB hands the rows to an encoder: titles before texts, instructions after them."""
        about = {name: options[name] for name in ("task_metadata", "num_proc")}
        return _encoded(self._model, create_dataloader(rows, prompt_type=side, **about).dataset)


class PooledVectors:
    """A model as MTEB's `EncoderProtocol`: unit vectors of texts and videos, for every task.

    They are those of `pool_text` and `pool_videos`, and are compared by their dot products.
    """

    def __init__(self, model: RetrievalModel):
        check_model(model, type(self).__name__)
        self._model = model

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """As of `LateInteraction`, with another name."""
        return _meta(self._model, "-pooled", ScoringFunction.COSINE, "dense")

    def encode(self, inputs: Any, **options: Any) -> np.ndarray:
        """Encodes the dataset of a DataLoader: float32 [N, D]; UserError as of `index`."""
        kind, features = _encoded(self._model, inputs.dataset)
        pool = self._model.pool_text if kind == "text" else self._model.pool_videos
        return pool(features)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Vectors [A, D] and [B, D], or one [D], -> float32 [A, B]."""
        one, other = (np.atleast_2d(np.asarray(array)) for array in (embeddings1, embeddings2))
        return one @ other.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Vectors [A, D] each -> float32 [A]."""
        return (np.asarray(embeddings1) * np.asarray(embeddings2)).sum(axis=-1)


def _meta(model: RetrievalModel, suffix: str, compared: ScoringFunction, kind: str) -> ModelMeta:
    config = model.config
    return ModelMeta.create_empty(
        {
            # MTEB keeps results by name and revision.
            "name": f"drl_jax/{config.model.interaction}{suffix}",
            "revision": model.fingerprint,
            "modalities": ["text", "video"],
            "model_type": [kind],
            "similarity_fn_name": compared,
            "embed_dim": config.model.backbone.embed_dim,
            "max_tokens": config.data.max_words,
            "framework": ["JAX"],
            "use_instructions": False,
        }
    )


def _encoded(model: RetrievalModel, rows: datasets.Dataset) -> tuple[str, dict[str, np.ndarray]]:
    """The kind of the rows of a task, "text" or "video", and their arrays."""
    kinds = [kind for kind in ("text", "image", "video") if kind in rows.column_names]
    if kinds not in (["text"], ["video"]):
        has = " and ".join(kinds) or ", ".join(rows.column_names)
        raise UserError(f"MTEB: drl_jax encodes texts or videos, and a row of the task has {has}")
    (kind,) = kinds
    if kind == "text":
        return kind, model.encode_text(list(rows["text"]))
    if isinstance(rows.features["video"], datasets.Video):
        # The files: MTEB's decoder does not read them as `read_video` does.
        rows = rows.cast_column("video", datasets.Video(decode=False))
    return kind, model.encode_videos(map(_clip, rows["video"]))


def _clip(value: Any) -> str | bytes | np.ndarray:
    """A file, its content, or decoded pictures [T, C, H, W], as `encode_videos` takes them."""
    if not isinstance(value, dict):
        return np.asarray(value, np.uint8)
    return value["path"] if value["bytes"] is None else value["bytes"]
