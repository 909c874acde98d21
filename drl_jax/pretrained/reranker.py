"""The reranker beside a model that was loaded (docs/rerank.md)."""

from collections.abc import Mapping

import jax
import numpy as np

from drl_jax.config import Config
from drl_jax.evaluation.reranking import RerankScorer
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.runs.reranker_file import read_reranker, reranker_path


class LoadedReranker:
    """Changes similarities of the model of a configuration and parameters.

    `source` says whether that is from a run, or a file of weights. Errors are those of
    `read_reranker`.
    """

    def __init__(self, source: Mapping[str, str], config: Config, params: Params):
        found = read_reranker(reranker_path(source), config, params)
        self._scorer, self._params = RerankScorer(found.config), jax.device_put(found.params)

    def changes(self, text: Features, video: Features) -> np.ndarray:
        """Arrays of A texts and B videos -> changes of their similarities, float32 [A, B]."""
        return self._scorer.changes(self._params, text, video)

    def explain(self, text: Features, video: Features) -> tuple[np.ndarray, np.ndarray]:
        """As `RerankScorer.explain`, of a video without an axis of items."""
        video = {name: array[None] for name, array in video.items()}
        return self._scorer.explain(self._params, text, video)
