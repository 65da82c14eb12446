"""Choosing among scored completions, against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from llmscale.rl.selection import best_of_k, first_of_each, kl_bound, ranks_of, score_at_fraction, spread_out


def over_all_subsets(scores: list[float], values: list[float], k: int) -> float:
    """The mean over every subset of k, and over the ties for its highest score."""
    means = []
    for subset in itertools.combinations(range(len(scores)), k):
        highest = max(scores[i] for i in subset)
        means.append(np.mean([values[i] for i in subset if scores[i] == highest]))
    return float(np.mean(means))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_best_of_k_is_the_mean_over_all_subsets(seed: int, levels: int):
    """Few levels: many ties."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, size=9).astype(float)
    values = rng.normal(size=9)
    expected = [over_all_subsets(scores.tolist(), values.tolist(), k) for k in range(1, 10)]
    np.testing.assert_allclose(best_of_k(scores, values), expected, rtol=0, atol=1e-9)
    own = [over_all_subsets(scores.tolist(), scores.tolist(), k) for k in range(1, 10)]
    np.testing.assert_allclose(best_of_k(scores, scores), own, rtol=0, atol=1e-9)


def test_best_of_k_starts_at_the_mean_ends_at_the_best_and_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=500)
    curve = best_of_k(scores, scores)
    assert curve[0] == pytest.approx(scores.mean(), abs=1e-9) and curve[-1] == pytest.approx(scores.max(), abs=1e-9)
    assert (np.diff(curve) > 0).all()
    shuffled = rng.permutation(scores)
    np.testing.assert_allclose(best_of_k(shuffled, shuffled), curve, rtol=0, atol=1e-9)
    assert best_of_k(scores[:1], scores[:1]).tolist() == [scores[0]]


def test_best_of_k_is_unbiased():
    """From sets of 6, the best of 3 of a known distribution."""
    levels, probabilities = np.arange(4.0), np.array([0.4, 0.3, 0.2, 0.1])
    below = np.cumsum(probabilities) ** 3
    expected = float(levels @ np.diff(below, prepend=0.0))
    sets = np.random.default_rng(1).choice(levels, p=probabilities, size=(20_000, 6))
    estimates = [best_of_k(s, s)[2] for s in sets]
    assert abs(np.mean(estimates) - expected) < 4 * np.std(estimates) / math.sqrt(len(estimates))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("probabilities", [[0.5, 0.5], [0.7, 0.2, 0.1], [1 / 300] * 300])
def test_the_kl_bound_holds_and_is_near_where_nothing_is_likely(n: int, probabilities: list[float]):
    p = np.array(probabilities)  # in the order of their scores
    best = np.diff(np.cumsum(p) ** n, prepend=0.0)
    kl = float((best * np.log(best / p)).sum())
    assert kl <= kl_bound(n) + 1e-9
    if len(p) == 300:
        assert kl_bound(n) - kl < 0.01
    elif n > 1:
        assert kl_bound(n) - kl > 0.01


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ([0.5, 2.0, -1.0], [2, 1, 3]),
        ([1.0, 1.0, 0.0, 0.0, 0.0], [1, 1, 2, 2, 2]),
        ([3.0, 3.0], [1, 1]),
        ([0.0, -0.0], [1, 1]),
        ([7.0], [1]),
    ],
)
def test_equal_scores_have_equal_ranks(scores: list[float], ranks: list[int]):
    assert ranks_of(scores) == ranks


def test_duplicates_are_those_of_the_same_text():
    assert first_of_each(["a", "b", " a\n", "c", "b", "A"]) == [0, 1, 3, 5]
    assert first_of_each([]) == []


def test_a_selection_has_the_best_the_worst_and_what_lies_between():
    scores = [float(s) for s in np.random.default_rng(0).permutation(33)]
    chosen = spread_out(scores, 9)
    assert chosen == sorted(chosen)
    assert sorted(scores[i] for i in chosen) == [0.0, 4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0, 32.0]
    assert spread_out(scores[:9], 9) == list(range(9))
    for n in range(10, 40):
        assert len(set(spread_out([1.0] * n, 9))) == 9


@pytest.mark.parametrize(
    ("fraction", "least"), [(0.01, 10.0), (0.1, 10.0), (0.11, 9.0), (0.3, 8.0), (0.7, 4.0), (1.0, 1.0)]
)
def test_the_score_of_the_best_fraction(fraction: float, least: float):
    assert score_at_fraction([float(s) for s in range(1, 11)], fraction) == least
    assert score_at_fraction([], fraction) == math.inf


def test_ties_with_the_last_of_a_fraction_are_in_it():
    scores = [1.0] * 4 + [0.0] * 6
    assert score_at_fraction(scores, 0.25) == 1.0 and score_at_fraction(scores, 0.5) == 0.0
