"""Choosing among the scored completions of one prompt: ranks, what the best of k would score, and which are worth learning.

Legend: N completions of one prompt, sampled independently.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np


def ranks_of(scores: Sequence[float]) -> list[int]:
    """1 is the highest score; equal scores are tied, and no rank is left out after them."""
    place = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True), start=1)}
    return [place[score] for score in scores]


def first_of_each(texts: Sequence[str]) -> list[int]:
    """Where each distinct text stands first. White space at the ends makes no difference."""
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(text.strip(), i)
    return list(first.values())


def spread_out(scores: Sequence[float], num: int) -> list[int]:
    """`num` of them, evenly spaced from the best to the worst, in their own order; all where there are no more."""
    if len(scores) <= num:
        return list(range(len(scores)))
    best_first = np.argsort(-np.asarray(scores), kind="stable")
    chosen = [best_first[round(i * (len(scores) - 1) / (num - 1))] for i in range(num)]
    return sorted(int(i) for i in chosen)


def score_at_fraction(scores: Iterable[float], fraction: float) -> float:
    """The lowest score in the best `fraction` of them; at least one is in it. Infinite where there is none."""
    ordered = sorted(scores, reverse=True)
    # The tolerance: 0.7 * 10 is a little more than 7 in binary, and would be 8 of 10.
    return ordered[max(1, math.ceil(fraction * len(ordered) - 1e-9)) - 1] if ordered else math.inf


def best_of_k(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 [N]: for k = 1 .. N, the mean of `values` [N] at the highest of `scores` [N] over every subset of k.

    The unbiased estimator of what best-of-k gives (Nakano et al. 2021, arXiv:2112.09332; with scores of 0 and 1 it is
    pass@k, Chen et al. 2021, arXiv:2107.03374): the i-th lowest is the highest of C(i - 1, k - 1) of the C(N, k) subsets. Of
    equal scores each is as likely to be chosen.
    """
    _, place, size = np.unique(scores, return_inverse=True, return_counts=True)
    shared = np.bincount(place, weights=values) / size  # what a choice among equal scores gives
    return _subset_weights(len(scores)) @ shared[np.sort(place)]


def kl_bound(n: int) -> float:
    """Nats: log n - (n - 1) / n. KL(best-of-n || the policy that is sampled) is at most this (Beirami et al. 2024,
    arXiv:2401.01879), and comes near it where no completion is likely."""
    return math.log(n) - (n - 1) / n


@cache
def _subset_weights(n: int) -> np.ndarray:
    """[N, N]: row k - 1 has the probability that the i-th lowest of n is the highest of a random subset of k."""
    weights = np.zeros((n, n))
    weights[:, n - 1] = np.arange(1, n + 1) / n  # the highest is in k of n subsets
    for i in range(n - 2, -1, -1):  # C(i, k - 1) / C(i + 1, k - 1) = (i + 2 - k) / (i + 1), counted from 0
        weights[:, i] = weights[:, i + 1] * np.maximum(i + 2 - np.arange(1, n + 1), 0) / (i + 1)
    return weights
