"""The noise that sampling adds: standard Gumbel, a function of its keys alone, and never the same twice."""

from __future__ import annotations

import numpy as np
import pytest

from llmscale.rollout.sampling import gumbel_noise


def test_is_standard_gumbel():
    noise = np.sort(gumbel_noise(seed=0, draw_id=0, sample_index=0, turn=0, position=0, size=20_000))
    expected = np.exp(-np.exp(-noise))  # its distribution function
    empirical = (np.arange(len(noise)) + 0.5) / len(noise)
    assert np.abs(expected - empirical).max() < 1.95 / np.sqrt(len(noise))  # Kolmogorov-Smirnov at 0.1%


def test_is_a_function_of_its_keys():
    keys = {"seed": 3, "draw_id": 7, "sample_index": 1, "turn": 0, "position": 5}
    first = gumbel_noise(**keys, size=50)
    np.testing.assert_array_equal(first, gumbel_noise(**keys, size=50))
    np.testing.assert_array_equal(first[:10], gumbel_noise(**keys, size=10))
    assert first.dtype == np.float64 and np.isfinite(first).all()


@pytest.mark.parametrize("key", ["seed", "draw_id", "sample_index", "turn", "position"])
def test_neighbouring_keys_share_no_number(key: str):
    """A shared number anywhere in the two, shifted or not, would tie the choice of one token to that of another."""
    keys = {"seed": 0, "draw_id": -2, "sample_index": 0, "turn": 0, "position": 0}
    seen: set[float] = set()
    for offset in range(4):
        noise = gumbel_noise(**(keys | {key: keys[key] + offset}), size=500).tolist()
        assert not seen & set(noise)
        seen |= set(noise)
