"""What is learned from a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option

# What a reward model that learned from this judges.
JUDGES = {"rankings": "completions", "solutions": "steps"}


@dataclass
class ObjectiveConfig:
    name: str = MISSING
    reads = "tokens"  # no setting: what its examples are: tokens, rankings or solutions


@option("objective", "causal_lm", builds="llmscale.objectives.causal_lm:CausalLM")
@dataclass
class CausalLMConfig(ObjectiveConfig):
    """Next-token cross-entropy on the target tokens: all of them in raw text, the assistant's in conversations."""

    name: str = "causal_lm"


class RankingKind(Enum):
    pairs = "pairs"  # InstructGPT: every untied pair of one prompt
    plackett_luce = "plackett_luce"  # likelihood of the whole order


@option("objective", "ranking", builds="llmscale.objectives.ranking:Ranking")
@dataclass
class RankingConfig(ObjectiveConfig):
    """Reward modelling from rankings of K completions of one prompt."""

    name: str = "ranking"
    kind: RankingKind = RankingKind.pairs
    # By how much a better completion's score must lead, for each unit that its rating is higher; 0: by nothing
    margin: float = 0.0
    reads = "rankings"

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, margin=0)
        if self.margin > 0 and self.kind is not RankingKind.pairs:
            yield "margin", "is a margin between the two of a pair", "Set it to 0, or objective.kind=pairs."


@option("objective", "process", builds="llmscale.objectives.process:Process")
@dataclass
class ProcessConfig(ObjectiveConfig):
    """A process reward model: the probability that each step of a solution is right."""

    name: str = "process"
    reads = "solutions"
