"""The shipped settings of the general policy gradient."""

from __future__ import annotations

from functools import cache

from llmscale.compose import choices, compose
from llmscale.rl.config import PolicyGradientConfig
from llmscale.rl.policy_gradient import PolicyGradient

MAX_NEW_TOKENS = 8
ALGORITHMS = choices("algorithm")


@cache
def setting(name: str, *overrides: str) -> PolicyGradientConfig:
    """What `algorithm=<name>` composes to."""
    import llmscale.stages.config  # noqa: F401  registers every option

    needed = ["data.train=x", "model.path=x", "reward=answer", "rollout.group_size=4", "training.prompts_per_step=64"]
    config: PolicyGradientConfig = compose("rlhf", [*needed, f"algorithm={name}", *overrides]).algorithm
    return config


def algorithm(name: str, *overrides: str) -> PolicyGradient:
    return PolicyGradient(setting(name, *overrides), MAX_NEW_TOKENS)
