"""Rewards from a model that `llmscale reward` trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from llmscale import distributed
from llmscale.batch import Trajectory, token_tensors
from llmscale.errors import ModelError
from llmscale.functional import last_token
from llmscale.models.loading import has_scalar_head, load_scalar_model, load_tokenizer
from llmscale.protocols import Score
from llmscale.rewards.config import LearnedConfig

BATCH_SIZE = 32  # rows of one forward


class LearnedReward:
    """The scalar at the last token."""

    def __init__(self, config: LearnedConfig, tokenizer: PreTrainedTokenizerFast):
        if not has_scalar_head(config.path):
            raise ModelError("this is not a reward model", where="reward.path", fix="Name a run of llmscale reward.")
        if load_tokenizer(config.path).get_vocab() != tokenizer.get_vocab():
            raise ModelError("the reward model's tokens are not the policy's", where="reward.path")
        self.config = config
        self.model = load_scalar_model(config.path).to(distributed.device()).eval()

    @torch.no_grad()
    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        rewards: list[float] = []
        for start in range(0, len(trajectories), BATCH_SIZE):
            rewards += self._score([t.token_ids for t in trajectories[start : start + BATCH_SIZE]])
        unfinished = self.config.unfinished
        if unfinished is not None:
            rewards = [r if t.finished else unfinished for r, t in zip(rewards, trajectories, strict=True)]
        return [Score(reward) for reward in rewards]

    def _score(self, rows: list[np.ndarray]) -> list[float]:
        tensors = {name: value.to(distributed.device()) for name, value in token_tensors(rows).items()}
        scalars = self.model(input_ids=tensors["input_ids"], position_ids=tensors["position_ids"])
        return last_token(scalars.float(), tensors["lengths"]).tolist()
