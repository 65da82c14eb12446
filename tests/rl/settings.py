"""The shipped settings of the general policy gradient, and something for them to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from llmscale.compose import choices, compose
from llmscale.rl.config import PolicyGradientConfig
from llmscale.rl.experience import Experience
from llmscale.rl.policy_gradient import PolicyGradient
from tests.tiny import VOCAB_SIZE

MAX_NEW_TOKENS = 8
ALGORITHMS = choices("algorithm")


@cache
def setting(name: str, *overrides: str) -> PolicyGradientConfig:
    """What `algorithm=<name>` composes to."""
    import llmscale.stages  # noqa: F401  registers every option

    needed = ["data.train=x", "model.path=x", "reward=answer", "rollout.group_size=4", "training.prompts_per_step=64"]
    config: PolicyGradientConfig = compose("rlhf", [*needed, f"algorithm={name}", *overrides]).algorithm
    return config


def algorithm(name: str, *overrides: str) -> PolicyGradient:
    return PolicyGradient(setting(name, *overrides), MAX_NEW_TOKENS)


def experiences(lengths: Sequence[int], seed: int = 0) -> list[Experience]:
    rng = np.random.default_rng(seed)
    made = []
    for n in lengths:
        mask = np.arange(n) >= n // 3
        numbers = [np.where(mask, rng.normal(size=n), 0).astype(np.float32) for _ in range(5)]
        for i in (0, 1):  # likely log-probabilities, of old policy and reference
            numbers[i] = np.where(mask, numbers[i] * 0.3 - 4, 0).astype(np.float32)
        importance = rng.uniform(0.5, 1.5, n).astype(np.float32)
        made.append(Experience(rng.integers(0, VOCAB_SIZE, n), mask, *numbers, importance, kl_coef=0.3))
    return made
