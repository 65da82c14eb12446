"""Calibration against a direct computation, and on data whose calibration is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmscale.objectives.calibration import calibration


def direct(evidence: list[float]) -> tuple[float, float, float]:
    """Guo et al. 2017, eq. 3, with ten bins; Brier 1950; log-loss."""
    judged = [(1 / (1 + math.exp(-abs(m))), float(m > 0)) for m in evidence]
    ece = 0.0
    for b in range(10):
        low, high = 0.5 + b * 0.05, 0.5 + (b + 1) * 0.05
        own = [(c, r) for c, r in judged if low <= c < high or (b == 9 and c >= high)]
        if own:
            confidence, accuracy = (sum(x[i] for x in own) / len(own) for i in (0, 1))
            ece += len(own) / len(judged) * abs(accuracy - confidence)
    p = [1 / (1 + math.exp(-m)) for m in evidence]
    return ece, sum((1 - x) ** 2 for x in p) / len(p), -sum(math.log(x) for x in p) / len(p)


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_direct_computation(seed: int):
    evidence = np.random.default_rng(seed).normal(0.7, 2, 500)
    found = calibration(evidence)
    assert (found.ece, found.brier, found.log_loss) == pytest.approx(direct(evidence.tolist()), abs=1e-9)
    assert sum(b.count for b in found.bins) == found.num == 500
    assert all(b.low <= b.confidence <= b.high for b in found.bins)


def sampled(scale: float, num: int = 200_000) -> np.ndarray:
    """Log-odds of a model that says `scale` x the true ones."""
    rng = np.random.default_rng(0)
    true = rng.normal(0, 1.5, num)
    said = rng.random(num) < 1 / (1 + np.exp(-true))
    return scale * np.where(said, true, -true)


def test_a_model_that_knows_the_odds_is_calibrated_and_a_boaster_is_not():
    honest, boaster, timid = (calibration(sampled(scale)) for scale in (1.0, 3.0, 0.2))
    assert honest.ece < 0.005
    assert boaster.ece > 0.1 and all(b.accuracy < b.confidence for b in boaster.bins if b.low > 0.5)
    assert timid.ece > 0.1 and all(b.accuracy > b.confidence for b in timid.bins if b.low > 0.5)
    assert honest.log_loss < min(boaster.log_loss, timid.log_loss)  # both scores are proper
    assert honest.brier < min(boaster.brier, timid.brier)


def test_a_coin():
    found = calibration(np.zeros(4))
    assert (found.ece, found.brier, found.log_loss) == pytest.approx((0.0, 0.25, math.log(2)))


def test_huge_odds_are_finite():
    found = calibration(np.array([1e4, -1e4, 1e4, 1e4]))
    assert (found.ece, found.brier, found.log_loss) == pytest.approx((0.25, 0.25, 2500.0))


def test_the_table_can_be_read():
    found = calibration(np.array([2.0, 2.1, -2.0, 0.1]))
    table = found.table("pairs")
    assert "4 held-out pairs" in table and f"{found.ece:.4f}" in table
    assert "| 0.85-0.90 | 3 | 0.884 | 0.667 |" in table
    assert len(table.splitlines()) == 4 + len(found.bins)
