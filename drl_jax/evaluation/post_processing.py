"""Post-processing of similarities: methods, their parameters, and fitting them on a split.

Text to video corrects videos by a bank of captions, video to text corrects captions by a bank of
videos; the two directions have parameters of their own.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from drl_jax.evaluation.hubness import dual_softmax, dynamic_inverted_softmax, inverted_softmax, nnn
from drl_jax.evaluation.metrics import DIRECTIONS, Ranks, metrics_of, query_ranks

# Parameters of a method by name, e.g. {"beta": 20}.
Parameters = Mapping[str, float]
# Inverse temperatures that are tried; first the published one, which wins where several are best.
BETAS = (20, 2, 5, 10, 50, 100, 200)
# Numbers of largest similarities that NNN takes the mean of, likewise.
LARGEST = (128, 16)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of post-processing."""

    label: str  # of publications
    grid: tuple[Parameters, ...]  # that are tried; the first of equally good ones is chosen
    apply: Callable[..., np.ndarray]  # scores [Q, C], a bank [N, C], parameters -> scores [Q, C]
    uses_all_queries: bool = False  # of the test, instead of a bank

    @property
    def title(self) -> str:
        """The label, with a warning where it sees what no query alone can."""
        return self.label + (" (uses all test queries)" if self.uses_all_queries else "")


METHODS = {
    "is": Method("IS", tuple({"beta": beta} for beta in BETAS), inverted_softmax),
    "qbnorm": Method(
        "QB-Norm", tuple({"k": 1, "beta": beta} for beta in BETAS), dynamic_inverted_softmax
    ),
    "nnn": Method(
        "NNN", tuple({"k": k, "w": w} for k in LARGEST for w in (0.75, 0.25, 0.5, 1.0)), nnn
    ),
    "dsl": Method(
        "DSL",
        tuple({"beta": beta} for beta in (100, 2, 5, 10, 20, 50, 200)),
        lambda scores, bank, beta: dual_softmax(scores, beta),
        uses_all_queries=True,
    ),
}


class Similarities(NamedTuple):
    """Similarities of a split, and to a bank."""

    sim_matrix: np.ndarray  # float32 [A, B], captions by videos
    bank_captions: np.ndarray  # float32 [N, B], captions of the bank by videos
    bank_videos: np.ndarray  # float32 [A, M], captions by videos of the bank
    text_to_video: np.ndarray  # int [A], and pairs, as of `metrics.query_ranks`
    reversed_pairs: np.ndarray


def post_processed(
    method: Method, similarities: Similarities, direction: str, parameters: Parameters
) -> np.ndarray:
    """The scores by which a direction, "t2v" or "v2t", ranks: [A, B]."""
    if direction == "t2v":
        return method.apply(similarities.sim_matrix, similarities.bank_captions, **parameters)
    return method.apply(similarities.sim_matrix.T, similarities.bank_videos.T, **parameters).T


def direction_ranks(scores: np.ndarray, similarities: Similarities) -> Ranks:
    """Ranks of a split by scores [A, B] in the place of its similarities."""
    return query_ranks(scores, similarities.text_to_video, similarities.reversed_pairs)


def fit(method: Method, similarities: Similarities) -> dict[str, Parameters]:
    """The parameters of each direction with the best R@1, of equal ones with the best mean rank."""

    def quality(direction: str, parameters: Parameters) -> tuple[float, float]:
        scores = post_processed(method, similarities, direction, parameters)
        metrics: dict[str, Any] = metrics_of(direction_ranks(scores, similarities))[direction]
        return metrics["R@1"], -metrics["MnR"]

    return {way: max(method.grid, key=functools.partial(quality, way)) for way in DIRECTIONS}


def describe(method: Method, fitted: Mapping[str, Parameters], bank: str) -> str:
    """The protocol of a method in words, e.g. "NNN t2v k=128 w=0.75, v2t ..; bank of ..".

    `fitted` has the parameters by direction; `bank` says what its bank is.
    """
    values = ", ".join(
        " ".join([way, *(f"{name}={value:g}" for name, value in fitted[way].items())])
        for way in DIRECTIONS
    )
    source = "" if method.uses_all_queries else f"; bank of {bank}"
    return f"{method.title} {values}, fitted on val{source}"
