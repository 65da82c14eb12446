"""A weighted sum of rewards, learned ones and rules alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.config import build
from llmscale.errors import LlmscaleError
from llmscale.protocols import RewardFunction, Score
from llmscale.rewards.config import RewardConfig, SumConfig


def build_reward(config: RewardConfig, tokenizer: PreTrainedTokenizerFast, where: str) -> RewardFunction:
    """The reward function; errors name their place below `where`, its dotted path in the config."""
    try:
        made: Any = build(config, tokenizer)
    except LlmscaleError as error:  # a reward speaks of itself as `reward`
        if error.where is not None and error.where.partition(".")[0] == "reward":
            error.where = where + error.where.removeprefix("reward")
        raise
    return made


class SumReward:
    """Sum of weight x part; a sample that a part of any weight but 0 cannot score has no score."""

    def __init__(self, config: SumConfig, tokenizer: PreTrainedTokenizerFast):
        self.parts = {n: build_reward(part, tokenizer, f"reward.parts.{n}") for n, part in config.parts.items()}
        self.weights = {name: config.weights.get(name, 1.0) for name in self.parts}

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        columns = {name: part(trajectories) for name, part in self.parts.items()}
        return [self._sum({name: column[i] for name, column in columns.items()}) for i in range(len(trajectories))]

    def _sum(self, scores: dict[str, Score]) -> Score:
        parts = {f"{name}/{inner}": value for name, score in scores.items() for inner, value in score.parts.items()}
        parts |= {name: score.value for name, score in scores.items() if score.value is not None}
        why = "; ".join(f"{name}: {score.why}" for name, score in scores.items() if score.why)
        counted = {name: weight for name, weight in self.weights.items() if weight}
        value, early, lacking = 0.0, None, []
        for name, weight in counted.items():
            part = scores[name].value
            if part is None:
                lacking.append(f"{name}: {scores[name].why}")
            else:
                value += weight * part
                own = scores[name].early
                if own is not None:
                    early = weight * own if early is None else early + weight * own
        return Score(None, parts, "; ".join(lacking)) if lacking else Score(value, parts, why, early)
