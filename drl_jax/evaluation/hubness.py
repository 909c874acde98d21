"""Corrections for hubs: candidates that are similar to almost every query, in NumPy.

`scores` [Q, C] are raw similarities of queries and candidates, without the temperature of training.
`bank` [N, C] are those of N other queries, which belong to none of the candidates. Inverted softmax
and NNN subtract one number of each candidate, its bias, from its similarities:

    inverted softmax   b_c = log(mean_n exp(beta * bank[n, c])) / beta
    NNN                b_c = w * mean of the k largest bank[:, c]

so a query is corrected without knowing any other. Without a bank there is no bias, and scores stay
as they are. `beta` is an inverse temperature. Arguments are never changed.
"""

import numpy as np


def inverted_softmax_bias(bank: np.ndarray, beta: float) -> np.ndarray:
    """Bias of inverted softmax (Smith et al., arXiv 1702.03859, equation 8).

    The published form, exp(beta * scores) / sum_n exp(beta * bank[n]), ranks the candidates of a
    query in the same way: it is N^-1 exp(beta * (scores - bias)). With the mean instead of the sum,
    the bias, float64 [C], is on the scale of similarities and does not grow with the bank.
    """
    if not len(bank):
        return np.zeros(bank.shape[1])
    logits = beta * np.asarray(bank, np.float64)
    largest = logits.max(axis=0)
    return (largest + np.log(np.exp(logits - largest).mean(axis=0))) / beta


def mean_of_largest(bank: np.ndarray, k: int) -> np.ndarray:
    """Mean of the k largest similarities of each candidate, or of all in a smaller bank.

    NNN subtracts it, float64 [C], w times (Chowdhury et al., arXiv 2410.24114, section 3).
    """
    count = min(k, len(bank))
    if not count:
        return np.zeros(bank.shape[1])
    largest = np.partition(bank, len(bank) - count, axis=0)[-count:]
    return largest.mean(axis=0, dtype=np.float64)


def inverted_softmax(scores: np.ndarray, bank: np.ndarray, beta: float) -> np.ndarray:
    """Scores without the bias of inverted softmax, in their precision: [Q, C]."""
    return scores - inverted_softmax_bias(bank, beta).astype(scores.dtype)


def nnn(scores: np.ndarray, bank: np.ndarray, k: int, w: float) -> np.ndarray:
    """Scores without the bias of NNN, in their precision: [Q, C]."""
    return scores - (w * mean_of_largest(bank, k)).astype(scores.dtype)


def dynamic_inverted_softmax(
    scores: np.ndarray, bank: np.ndarray, beta: float, k: int = 1
) -> np.ndarray:
    """QB-Norm (Bogolin et al., arXiv 2112.12777, section 3.3): corrects queries that find a hub.

    A candidate is active if it is among the k best of a query of the bank, or equal to one of them.
    Queries whose best candidate is active get inverted softmax, the others keep their scores. Rows
    with and without the correction have different scales, so the result ranks the candidates of a
    query and nothing else: it is no score to show, nor to compare between queries.
    """
    count = min(k, bank.shape[1])
    lowest = np.partition(bank, bank.shape[1] - count, axis=1)[:, -count]
    active = (bank >= lowest[:, None]).any(axis=0)
    best = scores == scores.max(axis=1, keepdims=True)
    finds_hub = (best & active).any(axis=1)
    return np.where(finds_hub[:, None], inverted_softmax(scores, bank, beta), scores)


def dual_softmax(scores: np.ndarray, beta: float) -> np.ndarray:
    """DSL at test time (Cheng et al., arXiv 2109.04290), float64 [Q, C]: needs all test queries.

    Each score is multiplied by the share of its query in the candidate's softmax over all queries.
    A query that is asked alone keeps the ranks of its scores.
    """
    logits = beta * np.asarray(scores, np.float64)
    shares = np.exp(logits - logits.max(axis=0))
    return scores * (shares / shares.sum(axis=0)) * len(scores)
