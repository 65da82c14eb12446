"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from llmscale.optim.config import OptimConfig, Schedule


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up to `lr`, then down to `min_lr_ratio * lr`
    at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    if config.schedule is Schedule.constant:
        remaining = 1.0
    elif config.schedule is Schedule.linear:
        remaining = 1 - progress
    elif config.schedule is Schedule.wsd:
        # The decay is a fraction, not a count, because a run's length may be given in epochs; and 1 - sqrt, because
        # it ends lower than a linear one at every length that Hägele et al. 2024 tried.
        remaining = 1 - math.sqrt(max(0.0, 1 - (1 - progress) / config.decay_fraction))
    else:
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
