"""Reinforcement learning: what turns rewards into an update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


@dataclass
class AlgorithmConfig:
    """What every algorithm knows."""

    name: str = MISSING
    kl_coef: float = 0.05  # weight of the KL penalty to the reference in the reward, per nat
    num_epochs: int = 1  # passes over each step's experience
    global_batch_size: int = 64  # sequences of one optimizer step
    entropy_coef: float = 0.0  # weight of an entropy bonus in the policy's loss

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, kl_coef=0, num_epochs=1, global_batch_size=1, entropy_coef=0)


@option("algorithm", "ppo", builds="llmscale.rl.ppo:PPO")
@dataclass
class PPOConfig(AlgorithmConfig):
    """PPO (Schulman et al. 2017) with a critic, as InstructGPT used it."""

    name: str = "ppo"
    gamma: float = 1.0  # discount per token, 0..1
    lam: float = 0.95  # GAE's lambda, 0..1
    clip_low: float = 0.2  # ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float = 0.2
    value_clip: float | None = 0.2  # a new value moves this far from the old one before its loss is clipped; None: any
    whiten_advantages: bool = True  # to mean 0, deviation 1 over the tokens of the step

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, clip_low=0, clip_high=0, gamma=0, lam=0)
        if self.value_clip is not None and self.value_clip <= 0:
            yield "value_clip", f"must be above 0, is {self.value_clip}", "null means no clipping."
        for name in ("gamma", "lam"):
            if getattr(self, name) > 1:
                yield name, f"must be at most 1, is {getattr(self, name)}", "1 means no discount."
