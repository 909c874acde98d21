"""Ranks the first candidates of each query again with a reranker (`models.reranker`)."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from drl_jax.evaluation.evaluator import Evaluation
from drl_jax.evaluation.metrics import Ranks, caption_sets, query_ranks
from drl_jax.models.drl import Params
from drl_jax.models.interactions import Features
from drl_jax.models.reranker import RerankerConfig, pair_arrays, reranker_definition
from drl_jax.runtime.errors import UserError
from drl_jax.runtime.sharding import Layout

# Pairs that are compared at a time: the most, and what their number is a multiple of.
_PAIRS, _MULTIPLE = 256, 4

# Changes `pair_arrays`, for a study of what a reranker uses.
Change = Callable[[Features], Features]


class Reranked(NamedTuple):
    """Ranks of both stages together, and the scores that they follow from, float64 [A, B]."""

    ranks: Ranks
    t2v_scores: np.ndarray
    v2t_scores: np.ndarray


class PairScorer:
    """Scores pairs of encoded texts and videos; compiled once for each shape."""

    def __init__(
        self, config: RerankerConfig, dtype: str, layout: Layout, change: Change | None = None
    ):
        self._config, self._layout, self._change = config, layout, change
        definition, _ = reranker_definition(config, dtype)

        def changes(params, pairs):
            reranker = nnx.merge(definition, params)
            return reranker(pairs) / jnp.exp(reranker.logit_scale[...])

        def attention(params, pairs):
            return nnx.merge(definition, params).attention(pairs)

        ends: Any = {"in_shardings": (layout.replicated, layout.batch_sharded)}
        ends["out_shardings"] = layout.replicated
        self._changes, self._attention = (
            jax.jit(layout.on_mesh(function, dtype), **ends) for function in (changes, attention)
        )

    def pairs(self, text: Features, video: Features, *pairs: np.ndarray) -> Features:
        """As `models.reranker.pair_arrays`."""
        found = pair_arrays(self._config, text, video, *pairs)
        return found if self._change is None else self._change(found)

    def scores(
        self, params: Params, text: Features, video: Features, *pairs: np.ndarray
    ) -> np.ndarray:
        """Similarities of pairs (texts, videos, similarities [...]) as the reranker of `params`
        changes them: float64 [...]. Without a change, the similarity itself, bit for bit."""
        # Few shapes, which all devices share.
        count, multiple = pairs[0].size, math.lcm(_MULTIPLE, self._layout.device_count)
        size, found = -(-min(_PAIRS, count) // multiple) * multiple, []
        for start in range(0, count, size):
            # The last batch repeats the last pair: one shape, one compilation.
            part = np.minimum(np.arange(start, start + size), count - 1)
            batch = self.pairs(text, video, *(array.ravel()[part] for array in pairs))
            changes = self._changes(params, self._layout.put_batch(batch))
            found.append(np.asarray(changes, np.float64) + batch["score"])
        return np.concatenate(found)[:count].reshape(pairs[0].shape)

    def attention(self, params: Params, text: Features, video: Features) -> np.ndarray:
        """The attention to the words and frames of one pair, float32 [L + F]."""
        one = np.zeros(self._layout.device_count, int)
        pairs = self.pairs(text, video, one, one, one)
        found = np.asarray(self._attention(params, self._layout.put_batch(pairs)))[0]
        return found[: int(pairs["length"][0]) - 1]


def check_candidates(count: int, videos: int, where: str) -> None:
    """Raises UserError unless there are as many videos as candidates."""
    if not isinstance(count, int) or count < 1:
        raise UserError(f"rerank is a positive number of candidates, not {count!r}")
    if count > videos:
        raise UserError(f"--rerank={count} is above the {videos:,} videos of {where}")


def rerank_evaluation(
    score: Callable[..., np.ndarray],
    evaluation: Evaluation,
    count: int,
    reversed_pairs: np.ndarray | None = None,
) -> Reranked:
    """Ranks the first `count` candidates of each query of an evaluation again.

    The candidates of a video are sets of texts, by the best text of each. Pair accuracy compares
    both clips of each pair.

    `score` is `PairScorer.scores` of some parameters; `reversed_pairs` are as in `query_ranks`.
    """
    sim, owner = evaluation.sim_matrix, evaluation.ranks.text_to_video
    score = functools.partial(score, evaluation.text, evaluation.video)
    texts, videos = (np.arange(size)[:, None] for size in sim.shape)

    columns = np.argsort(-sim, axis=1, kind="stable")[:, :count]
    rows = np.broadcast_to(texts, columns.shape)
    t2v = replaced(sim, columns, score(rows, columns, sim[rows, columns]))

    best = _best_texts(sim, owner)  # [sets, videos]
    sets = np.argsort(-sim[best, videos.T].T, axis=1, kind="stable")[:, :count]  # [videos, count]
    rows, columns = best[sets, videos], np.broadcast_to(videos, sets.shape)
    v2t = replaced(sim.T, rows, score(rows, columns, sim[rows, columns])).T

    ranks = dataclasses.replace(query_ranks(t2v, owner), v2t=query_ranks(v2t, owner).v2t)
    if reversed_pairs is not None and len(reversed_pairs):
        other = np.full(sim.shape[1], -1)
        other[reversed_pairs[:, 0]], other[reversed_pairs[:, 1]] = reversed_pairs.T[::-1]
        rows = np.flatnonzero(other[owner] >= 0)
        columns = np.stack([owner[rows], other[owner[rows]]], axis=1)
        rows, pairs = np.broadcast_to(rows[:, None], columns.shape), sim.astype(np.float64)
        pairs[rows, columns] = score(rows, columns, sim[rows, columns])
        of_pairs = query_ranks(pairs, owner, reversed_pairs)
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
