"""Where rewards come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


@dataclass
class RewardConfig:
    name: str = MISSING

    def needs_columns(self) -> list[str]:
        """Columns that every prompt's record must have."""
        return []


class Combine(Enum):
    """How the scores of an ensemble become one reward."""

    mean = "mean"
    minimum = "minimum"  # what the most sceptical member says
    lower_bound = "lower_bound"  # mean - std_coef x their standard deviation; Coste et al. 2024 take off the variance


@option("reward", "learned", builds="llmscale.rewards.learned:LearnedReward")
@dataclass
class LearnedConfig(RewardConfig):
    """A reward model trained by `llmscale reward`, or several."""

    name: str = "learned"
    path: str = MISSING  # its run directory or Hugging Face folder
    ensemble: list[str] = field(default_factory=list)  # more of them: runs of other seeds on the same rankings
    combine: Combine = Combine.mean  # of an ensemble's scores
    std_coef: float = 1.0  # deviations that combine=lower_bound takes off; 0 or more
    unfinished: float | None = None  # reward of a completion cut off at the length limit; None: as the model scores it

    def members(self) -> list[tuple[str, str]]:
        """(the key that names it, its path) of each model."""
        return [("reward.path", self.path), *((f"reward.ensemble[{i}]", p) for i, p in enumerate(self.ensemble))]

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, std_coef=0)
        if self.combine is not Combine.mean and not self.ensemble:
            what = f"{self.combine.name} of a single model is its own score"
            yield "combine", what, "Name more models in reward.ensemble=[...], or leave it out."
        if len({self.path, *self.ensemble}) <= len(self.ensemble):
            yield "ensemble", "names a model twice", "Name each once, reward.path is one of them."


class Aggregation(Enum):
    """How the probabilities of a solution's steps become one reward."""

    minimum = "minimum"
    product = "product"
    last = "last"


@option("reward", "process", builds="llmscale.rewards.process:ProcessReward")
@dataclass
class ProcessRewardConfig(RewardConfig):
    """A process reward model, trained by `llmscale reward objective=process`."""

    name: str = "process"
    path: str = MISSING  # its run directory or Hugging Face folder
    aggregation: Aggregation = Aggregation.product


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


@option("reward", "code", builds="llmscale.rewards.code:CodeReward")
@dataclass
class CodeConfig(RewardConfig):
    """The completion is Python: 1 where it passes the tests of its prompt's record, else 0. It runs in a sandbox."""

    name: str = "code"
    column: str = "tests"  # of the record: Python with assertions, or a list of such, each one a test
    partial: bool = False  # the reward is the fraction of the tests that pass
    timeout_s: float = 5.0  # of a program and its tests together
    memory_bytes: int = 256 * 2**20  # address space of a process; 64 MiB or more
    max_processes: int = 4  # and threads that a program may start
    output_bytes: int = 2**16  # that it may print
    files_bytes: int = 2**24  # that it may write in its directory; 64 KiB or more
    num_workers: int | None = None  # programs that run side by side; null: as many as there are processors

    def needs_columns(self) -> list[str]:
        return [self.column]

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, timeout_s=0.1, memory_bytes=64 * 2**20, max_processes=0)
        yield from at_least(self, output_bytes=1, files_bytes=2**16, num_workers=1)
