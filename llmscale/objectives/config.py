"""What is learned from a file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from llmscale.config import option


@dataclass
class ObjectiveConfig:
    name: str = MISSING
    reads = "tokens"  # no setting: what its examples are, tokens or rankings


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
    reads = "rankings"
