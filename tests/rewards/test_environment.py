"""The environment's own reward: its sum, and where each part belongs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmscale.batch import Trajectory
from llmscale.config import build
from llmscale.rewards.config import EnvironmentRewardConfig, LengthConfig, RewardConfig, SumConfig
from llmscale.rl.config import PolicyGradientConfig
from llmscale.rl.experience import Scored, build_experience
from llmscale.rl.policy_gradient import PolicyGradient
from tests.tiny import tokenizer, trajectory

OWN = [0, 1, 1, 0, 0, 1, 1, 1]  # two turns, which end at 2 and 7


@pytest.fixture
def sample() -> Trajectory:
    given = np.zeros(8, dtype=np.float32)
    given[[2, 7]] = 0.25, -2.0
    return replace(trajectory([1] * 8, OWN, completion="ab"), turn_rewards=given)


def test_the_sum_is_the_reward_and_what_came_before_the_end_is_known(sample):
    (score,) = build(EnvironmentRewardConfig(), tokenizer())([sample])
    assert score.value == -1.75 and score.early.tolist() == [0, 0, 0.25, 0, 0, 0, 0, 0]
    (score,) = build(EnvironmentRewardConfig(), tokenizer())([replace(sample, turn_rewards=np.eye(8, dtype="f")[7])])
    assert score.value == 1 and score.early is None


def test_a_sum_weighs_the_parts_of_the_turns_too(sample):
    parts: dict[str, RewardConfig] = {"game": EnvironmentRewardConfig(), "brief": LengthConfig(longest=9)}
    (score,) = build(SumConfig(parts=parts, weights={"game": 2.0}), tokenizer())([sample])
    assert score.value == -2.5 and score.early.tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0]
    (score,) = build(SumConfig(parts=parts, weights={"game": 0.0}), tokenizer())([sample])
    assert score.value == 1 and score.early is None


def test_with_ppo_a_turns_reward_stands_at_its_last_token(sample):
    """Lambda and gamma 1 and no critic: a token's return is what its environment gave from there on."""
    ppo = PolicyGradient(PolicyGradientConfig(lam=1.0, gamma=1.0, whiten_advantages=False), 8)
    (score,) = build(EnvironmentRewardConfig(), tokenizer())([sample])
    zeros = np.zeros(8, dtype=np.float32)
    scored = Scored(sample, score.value, None, zeros, None, zeros, early=score.early)
    (experience,), metrics = build_experience(ppo, [scored], 0.0)
    assert experience.returns.tolist() == [0, -1.75, -1.75, 0, 0, -2, -2, -2] and metrics["reward/mean"] == -1.75
