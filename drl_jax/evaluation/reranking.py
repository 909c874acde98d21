"""Ranks the first candidates of each query again with a reranker (`models.reranker`)."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.evaluation.metrics import Ranks, caption_sets, query_ranks
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.interactions.token_wise import TokenWise
from drl_jax.models.reranker import RerankerConfig, reranker_definition
from drl_jax.runtime.errors import UserError

# Texts or videos that are encoded at a time, at most.
_ROWS = 256


class Reranked(NamedTuple):
    """Ranks of both stages together, and the scores that they follow from, float64 [A, B]."""

    ranks: Ranks
    t2v_scores: np.ndarray
    v2t_scores: np.ndarray


class RerankScorer:
    """What a reranker adds to similarities; compiled for few shapes, on one device."""

    def __init__(self, config: RerankerConfig):
        definition, _ = reranker_definition(config)

        def text(params, arrays):
            with jax.default_matmul_precision("highest"):
                return nnx.merge(definition, params).text(arrays)

        def video(params, arrays):
            with jax.default_matmul_precision("highest"):
                reranker = nnx.merge(definition, params)
                return reranker.video(arrays) / jnp.exp(reranker.logit_scale[...])

        self._text, self._video = jax.jit(text), jax.jit(video)

    def changes(self, params: Params, text: Features, video: Features) -> np.ndarray:
        """Arrays of A texts and B videos -> changes of their similarities, float32 [A, B]."""
        of_text = _in_parts(lambda part: self._text(params, part)[0], text, TokenWise.TEXT_ARRAYS)
        of_video = _in_parts(
            lambda part: self._video(params, part).sum(axis=1), video, TokenWise.VIDEO_ARRAYS
        )
        return of_text @ of_video.T

    def explain(
        self, params: Params, text: Features, video: Features
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of one pair: attention to words [L], of all heads, and what frames add [F].

        Attention sums to 1, and what frames add to the change.
        """
        of_text, attention = self._text(params, text)
        added = np.asarray(self._video(params, video)[0] @ of_text[0])
        return np.asarray(attention[0].mean(axis=0)), added


def _in_parts(
    encode: Callable[[Features], jax.Array], arrays: Features, names: tuple[str, ...]
) -> np.ndarray:
    """Encodes N rows, some at a time: float32 [N, D]."""
    arrays = {name: np.asarray(arrays[name]) for name in names}
    count = len(arrays[names[0]])
    # The last part repeats the last row: few shapes, and few compilations.
    size, found = min(_ROWS, 1 << (count - 1).bit_length()), []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        found.append(np.asarray(encode({name: array[rows] for name, array in arrays.items()})))
    return np.concatenate(found)[:count]


def check_candidates(count: int, videos: int, where: str) -> None:
    """Raises UserError unless there are as many videos as candidates."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"rerank is a positive number of candidates, not {count!r}")
    if count > videos:
        raise UserError(f"rerank={count} is above the {videos:,} videos of {where}")


def rerank_evaluation(
    scores: np.ndarray,
    evaluation: Evaluation,
    count: int,
    reversed_pairs: np.ndarray | None = None,
) -> Reranked:
    """Ranks the first `count` candidates of each query of an evaluation by other scores [A, B].

    The candidates of a video are sets of texts, by the best text of each. Pair accuracy compares
    both clips of each pair. `reversed_pairs` are as in `query_ranks`.
    """
    sim, owner = evaluation.sim_matrix, evaluation.ranks.text_to_video
    columns = np.argsort(-sim, axis=1, kind="stable")[:, :count]
    t2v = replaced(sim, columns, np.take_along_axis(scores, columns, axis=1))

    best = _best_texts(sim, owner)  # [sets, videos]
    videos = np.arange(sim.shape[1])[:, None]
    sets = np.argsort(-sim[best, videos.T].T, axis=1, kind="stable")[:, :count]  # [videos, count]
    rows = best[sets, videos]
    v2t = replaced(sim.T, rows, scores[rows, videos]).T

    ranks = dataclasses.replace(query_ranks(t2v, owner), v2t=query_ranks(v2t, owner).v2t)
    if reversed_pairs is not None and len(reversed_pairs):
        of_pairs = query_ranks(scores, owner, reversed_pairs)
        ranks = dataclasses.replace(ranks, pair_scores=of_pairs.pair_scores, pair=of_pairs.pair)
    return Reranked(ranks, t2v, v2t)


def replaced(sim: np.ndarray, candidates: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Similarities [Q, C] with new scores of the candidates of each row, int [Q, N]: float64.

    All others stay behind them, in their order.
    """
    found, inside = sim.astype(np.float64), np.zeros(sim.shape, bool)
    np.put_along_axis(inside, candidates, True, axis=1)
    highest = np.where(inside, -np.inf, found).max(axis=1)
    lowest = scores.min(axis=1)
    # What is behind already keeps its values: an untrained reranker changes nothing.
    shift = np.where(highest > lowest, 1 + highest - lowest, 0.0)
    found -= np.where(inside, 0.0, shift[:, None])
    np.put_along_axis(found, candidates, scores, axis=1)
    return found


def _best_texts(sim: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The first of the most similar texts of each set for each video: int [sets, videos]."""
    is_best = sim == caption_sets(sim, owner)[owner]
    best = np.zeros((sim.shape[1], sim.shape[1]), int)
    for text in reversed(range(len(sim))):
        best[owner[text], is_best[text]] = text
    return best
