"""The noise that sampling adds: standard Gumbel, a function of its keys alone, and never the same twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmscale.protocols import SamplingRequest
from llmscale.rollout.config import HFRolloutConfig
from llmscale.rollout.sampling import gumbel_noise, sample
from tests.tiny import prompt


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


P = torch.tensor([0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0]),  # 0.7 is not enough, 0.9 is
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # 4/9 is not enough
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
    ],
)
def test_truncation_renormalises_what_is_left(settings: dict[str, float], expected: list[float]):
    config, num = HFRolloutConfig(**settings), 4000
    requests = [SamplingRequest(prompt([1]), draw_id, 0) for draw_id in range(num)]
    tokens, logprobs = sample(P.log().expand(num, -1), requests, [0] * num, config, seed=1)
    shares = np.bincount(tokens, minlength=4) / num
    assert np.abs(shares - expected).max() < 4 * 0.5 / np.sqrt(num)
    assert not shares[np.array(expected) == 0].any()
    np.testing.assert_allclose(np.exp(logprobs), np.array(expected)[tokens], rtol=1e-5)
