"""Measures how many of the best windows are among the candidates of a scan, or of an engine."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from drl_jax.search.engine import SearchEngine
from drl_jax.search.query import encode_sentences
from drl_jax.search.ranking import FindCandidates
from drl_jax.search.session import Index


class Recall(NamedTuple):
    """What some number of candidates finds.

    Attributes:
      candidates: number of candidates per query.
      recall: share of the exact best windows that are among the candidates, 0 to 1.
      scan_seconds, compare_seconds, exact_seconds: median times in which candidates are found,
        these are compared exactly, and all windows are compared exactly.
    """

    candidates: int
    recall: float
    scan_seconds: float
    compare_seconds: float
    exact_seconds: float


def measure_recall(
    index: Index,
    sentences: Sequence[str],
    counts: Sequence[int],
    top: int,
    ask_engine: FindCandidates | None = None,
) -> list[Recall]:
    """Compares candidates with exact search, for each number of them.

    Args:
      index: whose interaction has vectors, and whose correction is used.
      sentences, counts, top: queries, numbers of candidates, and how many best windows to look for.
      ask_engine: finds the candidates; None: a scan.

    Raises:
      UserError: a sentence is blank, or the engine fails.
    """
    state, engine = index.state(), SearchEngine(index.model.config.model, index.model.params)
    gallery, correction = state.gallery, index.ranker.options.correction
    if correction is not None:
        gallery = gallery.with_biases(state.biases(correction))
    queries = encode_sentences(index.model, sentences)
    queries = [queries[0], *queries]  # The first one compiles, and is not counted.
    exact, report = [], []
    for query in queries:
        start = time.perf_counter()
        (best,) = engine.search(query.parts, gallery, top)
        exact.append((best.slots[:top], time.perf_counter() - start))
    for count in counts:
        times, found = [], 0
        for query, (best, seconds) in zip(tqdm(queries, f"{count} candidates"), exact, strict=True):
            start = time.perf_counter()
            vectors = index.model.interaction.query_vectors(query.parts[0].text)
            asked = ask_engine(state, vectors, count) if ask_engine else None
            (slots,) = asked or engine.scan(vectors, gallery, count)
            middle = time.perf_counter()
            engine.search(query.parts, gallery.copied(slots), top)
            found += len(np.intersect1d(slots, best)) if times else 0
            times.append((middle - start, time.perf_counter() - middle, seconds))
        medians = np.median(times[1:], axis=0).tolist()
        report.append(Recall(count, found / sum(len(best) for best, _ in exact[1:]), *medians))
    return report
