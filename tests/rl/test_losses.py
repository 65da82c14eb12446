"""Clipped losses against loops over tokens written from the papers, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llmscale.rl.losses import clipped_policy_loss, clipped_value_loss, is_clipped

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
    clipped = is_clipped(policy.detach(), old, advantages, LOW, HIGH)
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
