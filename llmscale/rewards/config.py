"""Where rewards come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


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
