"""How weights are updated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from llmscale.config import Problem, at_least


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) with a learning-rate schedule."""

    lr: float = 1e-3  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices only, never on biases, norms
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    schedule: Schedule = Schedule.cosine  # after the warm-up, over the steps of the run
    warmup_steps: int = 10
    min_lr_ratio: float = 0.1  # of the peak, at the end of the schedule

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, lr=0, eps=0, weight_decay=0, grad_clip=0, warmup_steps=0, min_lr_ratio=0)
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            yield "betas", f"must be two numbers in [0, 1), is {self.betas}", "For example [0.9,0.95]."
