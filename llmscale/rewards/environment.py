"""The reward that the environment of a completion of several turns gave for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.protocols import Score
from llmscale.rewards.config import EnvironmentRewardConfig


class EnvironmentReward:
    """Their sum. An algorithm that gives credit by token (a critic's, or the reward to come) has each at the end of its turn,
    and whatever comes after a turn is no merit of that turn alone."""

    def __init__(self, config: EnvironmentRewardConfig, tokenizer: PreTrainedTokenizerFast):
        pass

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        return [_score(t) for t in trajectories]


def _score(trajectory: Trajectory) -> Score:
    given = trajectory.turn_rewards
    assert given is not None, "the config was checked for an environment"
    early = given.copy()
    early[np.flatnonzero(trajectory.loss_mask)[-1]] = 0.0
    return Score(float(given.sum(dtype=np.float64)), early=early if early.any() else None)
