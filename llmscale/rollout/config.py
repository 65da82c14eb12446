"""How completions are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


@dataclass
class RolloutConfig:
    """Sampling. Truncation (top-p, top-k) is left out on purpose: the sampled distribution would no longer be the one
    whose log-probabilities are trained."""

    name: str = MISSING
    temperature: float = 1.0  # divides the logits; 0 is greedy, for generate and chat only
    max_new_tokens: int = 64  # longest completion in tokens
    group_size: int | None = None  # completions per prompt; None: 8 where rlhf's algorithm compares them, else 1
    unit_size: int = 32  # samples of one dispatch unit: generated as one batch on one worker, retried whole
    # Largest |rollout - trainer log-probability| of fresh samples; null: 1e-4 in fp32, 0.5 in bf16
    max_logprob_diff: float | None = None

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, temperature=0, max_new_tokens=1, group_size=1, unit_size=1, max_logprob_diff=0)


@option("rollout", "hf", builds="llmscale.rollout.hf:HFRollout")
@dataclass
class HFRolloutConfig(RolloutConfig):
    """Forwards of the Hugging Face model itself."""

    name: str = "hf"
