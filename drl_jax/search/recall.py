"""Measures how much of the exact answer the candidates of an engine contain."""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from drl_jax.search.candidates import CandidateSearch


@dataclasses.dataclass(frozen=True)
class Recall:
    """Recall of some number of candidates.

    Attributes:
      candidates: number of candidates per query.
      recall: share of the exact best windows that are among the candidates, 0 to 1.
      engine_seconds: median time of a query in the engine.
      rerank_seconds: median time of the exact comparison with the candidates.
      exact_seconds: median time of the exact comparison with all windows.
    """

    candidates: int
    recall: float
    engine_seconds: float
    rerank_seconds: float
    exact_seconds: float


def measure_recall(
    engine: CandidateSearch, sentences: Sequence[str], counts: Sequence[int], top: int
) -> list[Recall]:
    """Compares search with candidates to exact search.

    Args:
      engine: an engine with an exported collection.
      sentences: queries.
      counts: numbers of candidates.
      top: number of exact hits to look for.

    Raises:
      UserError: a sentence is blank, or the engine fails.
    """
    index = engine.session.snapshot()
    text = index.model.encode_text(sentences)
    queries = [
        {name: array[row : row + 1] for name, array in text.items()}
        for row in range(len(sentences))
    ]
    index.rank(queries[0], top)  # Compiles, and reads the arrays from disk.
    exact, exact_seconds = [], []
    for query in tqdm(queries, "exact search", unit="query", leave=False):
        start = time.perf_counter()
        exact.append(set(index.rank(query, top).slots[0]))
        exact_seconds.append(time.perf_counter() - start)
    wanted = sum(map(len, exact))
    report = []
    for count in counts:
        first = engine.candidates(index, queries[0], count)
        index.rank_windows(queries[0], top, first)  # Compiles.
        engine_seconds, rerank_seconds, found = [], [], 0
        for query, best in zip(
            tqdm(queries, f"{count} candidates", unit="query", leave=False), exact, strict=True
        ):
            start = time.perf_counter()
            candidates = engine.candidates(index, query, count)
            middle = time.perf_counter()
            slots = index.rank_windows(query, top, candidates).slots[0]
            rerank_seconds.append(time.perf_counter() - middle)
            engine_seconds.append(middle - start)
            found += len(best & set(slots))
        medians = map(np.median, (engine_seconds, rerank_seconds, exact_seconds))
        report.append(Recall(count, found / wanted, *map(float, medians)))
    return report
