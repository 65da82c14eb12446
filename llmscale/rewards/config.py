"""Where rewards come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llmscale.config import Problem, option


@dataclass
class RewardConfig:
    name: str = MISSING

    def needs_columns(self) -> list[str]:
        """Columns that every prompt's record must have."""
        return []


@option("reward", "learned", builds="llmscale.rewards.learned:LearnedReward")
@dataclass
class LearnedConfig(RewardConfig):
    """A reward model trained by `llmscale reward`."""

    name: str = "learned"
    path: str = MISSING  # its run directory or Hugging Face folder
    unfinished: float | None = None  # reward of a completion cut off at the length limit; None: as the model scores it


class Match(Enum):
    exact = "exact"  # the whole completion, white space at its ends aside
    number = "number"  # the last number in it


@option("reward", "answer", builds="llmscale.rewards.rules:AnswerReward")
@dataclass
class AnswerConfig(RewardConfig):
    """1 where the completion gives the reference answer of its prompt's record, else 0."""

    name: str = "answer"
    column: str = "answer"  # of the record, holding the reference answer
    match: Match = Match.exact

    def needs_columns(self) -> list[str]:
        return [self.column]


@option("reward", "function", builds="llmscale.rewards.function:FunctionReward")
@dataclass
class FunctionConfig(RewardConfig):
    """A Python function of yours: `def reward(prompt: str, completion: str, fields: dict) -> float`."""

    name: str = "function"
    path: str = MISSING  # FILE.py:FUNCTION

    def problems(self) -> Iterator[Problem]:
        if ".py:" not in self.path:
            yield "path", f"must be FILE.py:FUNCTION, is {self.path!r}", "For example rewards.py:brevity."
