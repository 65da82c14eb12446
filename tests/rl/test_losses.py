"""Clipped losses against loops over tokens written from the papers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmscale.rl.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    importance_weights,
    is_clipped,
    sequence_log_ratio,
)

LOW, HIGH = 0.2, 0.3


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Policy and old log-probabilities whose ratio runs from e^-2 to e^2, and advantages of either sign."""
    torch.manual_seed(0)
    old = torch.randn(400).double()
    return old + torch.linspace(-2, 2, 400).double(), old, torch.randn(400).double()


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss_equals_the_papers(numbers, dual_clip: float | None):
    """Schulman et al. 2017, eq. 7; Ye et al. 2020, eq. 5 where the advantage is negative."""
    result = clipped_policy_loss(*numbers, LOW, HIGH, dual_clip).tolist()
    for policy, old, advantage, loss in zip(*(x.tolist() for x in numbers), result, strict=True):
        ratio = math.exp(policy - old)
        surrogate = min(ratio * advantage, clip(ratio, 1 - LOW, 1 + HIGH) * advantage)
        if dual_clip is not None and advantage < 0:
            surrogate = max(surrogate, dual_clip * advantage)
        assert loss == pytest.approx(-surrogate, abs=1e-9)


def test_is_clipped_says_where_the_gradient_is_gone(numbers):
    policy, old, advantages = numbers
    policy.requires_grad_()
    clipped_policy_loss(policy, old, advantages, LOW, HIGH).sum().backward()
    clipped = is_clipped((policy.detach() - old).exp(), advantages, LOW, HIGH)
    assert torch.equal(policy.grad == 0, clipped)
    assert 0 < clipped.sum() < len(clipped)


def test_dual_clip_stops_the_gradient_of_large_ratios_with_negative_advantage(numbers):
    policy, old, advantages = numbers
    policy.requires_grad_()
    clipped_policy_loss(policy, old, advantages, LOW, HIGH, dual_clip=3.0).sum().backward()
    beyond = (advantages < 0) & ((policy - old).exp() > 3.0)
    assert beyond.any() and not policy.grad[beyond].any()


def test_value_loss_equals_a_loop(numbers):
    values, old, returns = numbers
    result = clipped_value_loss(values, old, returns, 0.2).tolist()
    for v, v_old, r, loss in zip(*(x.tolist() for x in numbers), result, strict=True):
        clipped = v_old + clip(v - v_old, -0.2, 0.2)
        assert loss == pytest.approx(max((v - r) ** 2, (clipped - r) ** 2) / 2, abs=1e-9)


# ---------------------------------------------------------------- ratios of sequences, and importance


def test_a_sequences_ratio_is_on_each_of_its_tokens():
    """Two sequences share a row, a third has one with padding; NaN stands where nothing may be read."""
    nan = float("nan")
    log_ratio = torch.tensor([[nan, 1.0, 3.0, nan, 5.0], [nan, -1.0, nan, nan, nan]], dtype=torch.float64)
    mask = ~log_ratio.isnan()
    sequence = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 0, 0]])
    found = sequence_log_ratio(log_ratio.requires_grad_(), mask, sequence)
    assert found.tolist() == [[2.0, 2.0, 2.0, 5.0, 5.0], [-1.0, -1.0, -1.0, 2.0, 2.0]]
    torch.where(mask, found, 0.0).sum().backward()
    assert torch.equal(log_ratio.grad, mask.double())  # n tokens, each with 1/n of the gradient


WEIGHTS = {
    "truncated": lambda ratio, total: min(max(ratio, LOW), 2.0),
    "masked": lambda ratio, total: ratio if LOW <= ratio <= 2.0 else 0.0,
    "sequence": lambda ratio, total: min(max(total, LOW), 2.0),
    "sequence_masked": lambda ratio, total: total if LOW <= total <= 2.0 else 0.0,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_importance_weights_equal_a_loop(kind: str):
    torch.manual_seed(0)
    policy, rollout = torch.randn(20, 3).double().requires_grad_(), torch.randn(20, 3).double()
    weights = importance_weights(policy, rollout, kind, LOW, 2.0)
    assert not weights.requires_grad
    for i in range(20):
        ratios = [math.exp(policy[i, t].item() - rollout[i, t].item()) for t in range(3)]
        expected = [WEIGHTS[kind](ratio, math.prod(ratios)) for ratio in ratios]
        assert weights[i].tolist() == pytest.approx(expected, abs=1e-9)
    assert importance_weights(rollout, rollout, kind, LOW, 2.0).tolist() == [[1.0] * 3] * 20


def test_unknown_importance_weights_are_refused():
    with pytest.raises(ValueError, match="truncated"):
        importance_weights(torch.zeros(1, 1), torch.zeros(1, 1), "tis", 0.0, 2.0)
