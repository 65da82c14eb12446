"""Generalised advantage estimation against the sums of the paper (Schulman et al. 2016), in float64."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from llmscale.rl.advantages import by_group, gae, group_relative, leave_one_out, whiten

NAN = float("nan")
MASKS = {
    "one turn": [0, 0, 1, 1, 1, 1, 0, 0],
    "two turns": [0, 1, 1, 0, 0, 1, 1, 0],
    "three turns to the end": [1, 0, 1, 0, 0, 1, 1, 1],
    "everything": [1, 1, 1, 1, 1, 1, 1, 1],
    "one token": [0, 0, 0, 0, 1, 0, 0, 0],
}


def reference(rewards: list[float], values: list[float], own: list[int], gamma: float, lam: float) -> list[float]:
    """Eq. 16: A_t = sum_l (gamma lam)^l delta_{t+l}, over the policy's own tokens alone."""
    steps = [t for t, mine in enumerate(own) if mine]
    v = [values[t] for t in steps] + [0.0]
    deltas = [rewards[t] + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
    advantages = [0.0] * len(own)
    for i, t in enumerate(steps):
        advantages[t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return advantages


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.tensor(list(MASKS.values())).bool()
    return torch.randn(mask.shape).double(), torch.randn(mask.shape).double(), mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_equals_the_paper(numbers, gamma: float, lam: float):
    rewards, values, mask = numbers
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b, own in enumerate(MASKS.values()):
        expected = torch.tensor(
            reference(rewards[b].tolist(), values[b].tolist(), own, gamma, lam), dtype=torch.float64
        )
        assert (advantages[b] - expected).abs().max() < 1e-9
        assert (returns[b] - torch.where(mask[b], expected + values[b], 0.0)).abs().max() < 1e-9


def test_monte_carlo_at_lambda_one(numbers):
    """lam = 1: the return is the discounted sum of what follows, whatever the critic says."""
    rewards, values, mask = numbers
    _, returns = gae(rewards, values, mask, 0.9, 1.0)
    for b, own in enumerate(MASKS.values()):
        steps = [t for t, mine in enumerate(own) if mine]
        for i, t in enumerate(steps):
            expected = sum(0.9**k * rewards[b, s].item() for k, s in enumerate(steps[i:]))
            assert returns[b, t].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dirt", [NAN, float("inf"), 1e9])
def test_what_stands_on_other_tokens_changes_nothing(numbers, dirt: float):
    rewards, values, mask = numbers
    dirty = [torch.where(mask, x, dirt) for x in (rewards, values)]
    for clean, result in zip(gae(rewards, values, mask, 0.9, 0.8), gae(*dirty, mask, 0.9, 0.8), strict=True):
        assert torch.equal(clean, result)


def test_padding_on_either_side_changes_nothing(numbers):
    plain = torch.stack(gae(*numbers, 0.9, 0.8))
    for left, right in ((3, 0), (0, 3), (2, 5)):
        padded = [torch.nn.functional.pad(x, (left, right), value=0) for x in numbers]
        result = torch.stack(gae(*padded, 0.9, 0.8))
        assert torch.equal(result[..., left : left + plain.shape[-1]], plain)
        assert not result[..., :left].any() and not result[..., left + plain.shape[-1] :].any()


def test_no_own_token_gives_zeros():
    ones = torch.ones(2, 3)
    assert not torch.stack(gae(ones, ones, torch.zeros(2, 3), 1.0, 0.95)).any()


def test_whitened_tokens_have_mean_zero_and_deviation_one(numbers):
    values, _, mask = numbers
    result = whiten(torch.where(mask, values * 7 + 3, NAN), mask)
    chosen = result[mask]
    assert abs(chosen.mean().item()) < 1e-9 and chosen.std(correction=0).item() == pytest.approx(1, abs=1e-7)
    assert not result[~mask].any()
    spread = (values[mask] - values[mask].mean()) / values[mask].std(correction=0)
    assert (chosen - spread).abs().max() < 1e-7  # eps 1e-8 under the root


def test_equal_values_whiten_to_zero():
    assert whiten(torch.full((2, 3), 5.0), torch.ones(2, 3)).abs().max() < 1e-3


# ---------------------------------------------------------------- within a group


@pytest.mark.parametrize("normalize_std", [False, True])
def test_group_relative_equals_a_loop(normalize_std: bool):
    torch.manual_seed(0)
    rewards = torch.randn(12).double()
    found = group_relative(rewards, 4, normalize_std)
    for start in range(0, 12, 4):
        group = rewards[start : start + 4].tolist()
        deviation = statistics.stdev(group) if normalize_std else 1.0
        expected = [(r - statistics.mean(group)) / deviation for r in group]
        assert found[start : start + 4].tolist() == pytest.approx(expected, abs=1e-9)


def test_leave_one_out_equals_a_loop():
    torch.manual_seed(0)
    rewards = torch.randn(12).double()
    found = leave_one_out(rewards, 4).tolist()
    for i, reward in enumerate(rewards.tolist()):
        others = [rewards[j].item() for j in range(12) if j // 4 == i // 4 and j != i]
        assert found[i] == pytest.approx(reward - statistics.mean(others), abs=1e-9)


@pytest.mark.parametrize("value", [0.1, -3.7, 1e6, 0.0])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_give_exactly_zero(value: float, size: int):
    """In float32 the mean of equal numbers is often another number."""
    rewards = torch.full((2 * size,), value)
    for found in (
        group_relative(rewards, size, True),
        group_relative(rewards, size, False),
        leave_one_out(rewards, size),
    ):
        assert found.tolist() == [0.0] * (2 * size)


def test_groups_of_several_sizes():
    rewards = torch.tensor([5.0, 1.0, 3.0, 0.0, 0.0, 3.0])
    assert by_group(rewards, [1, 2, 3], leave_one_out).tolist() == [0.0, -2.0, 2.0, -1.5, -1.5, 3.0]
