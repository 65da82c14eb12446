"""Rewards from a process reward model: a probability for each step of a solution, brought to one number.

`product` is the probability that every step is right, if they err independently (Lightman et al. 2023, section 2.6);
`minimum` is that of the weakest step (Wang et al. 2024, eq. 6); `last` that of the last one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.rewards.config import Aggregation, ProcessRewardConfig
from llmscale.rewards.learned import batches, load_reward_model
from llmscale.steps import StepFinder


class ProcessReward:
    """From 0 to 1. A completion without any step has nothing right: 0."""

    def __init__(self, config: ProcessRewardConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        self.model = load_reward_model(config.path, "reward.path", tokenizer, of="steps")
        self.finder = StepFinder(tokenizer)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [aggregated(steps, self.config.aggregation) for steps in self.by_step(trajectories)]

    @torch.no_grad()
    def by_step(self, trajectories: Sequence[Trajectory]) -> list[np.ndarray]:
        """Of each trajectory, the probability that each of its steps is right."""
        found: list[np.ndarray] = []
        for start, tensors in batches([t.token_ids for t in trajectories]):
            logits = self.model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"])
            rows = logits.float().sigmoid().cpu().numpy().astype(np.float64)
            for row, trajectory in zip(rows, trajectories[start:], strict=False):
                found.append(row[self.finder.ends(trajectory.token_ids, trajectory.loss_mask)])
        return found


def aggregated(steps: np.ndarray, how: Aggregation) -> float:
    """steps: [S] probabilities."""
    if len(steps) == 0:
        return 0.0
    match how:
        case Aggregation.minimum:
            return float(steps.min())
        case Aggregation.product:
            return float(steps.prod())
        case Aggregation.last:
            return float(steps[-1])
