"""How weights are updated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from llmscale.config import Problem, at_least


class Optimizer(Enum):
    adamw = "adamw"  # Loshchilov and Hutter 2019
    lion = "lion"  # Chen et al. 2023: the sign of a momentum, half of AdamW's state
    muon = "muon"  # Jordan et al. 2024: orthogonal updates of the blocks' matrices; AdamW for every other weight


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    wsd = "wsd"  # Hu et al. 2024: stable at the peak, then down as 1 - sqrt (Hägele et al. 2024)


@dataclass
class OptimConfig:
    """An optimizer, a learning-rate schedule, and an average of the weights."""

    optimizer: Optimizer = Optimizer.adamw  # muon needs whole matrices, so it needs engine=single
    # Peak learning rate. adamw and muon take the same one; lion wants 3 to 10 times less, with as much more weight_decay
    lr: float = 1e-3
    # Decay rates of the moments, each in [0, 1); null: [0.9,0.95], or [0.9,0.99] for lion. In muon, of its AdamW part
    betas: list[float] | None = None
    eps: float = 1e-8  # of adamw, and of muon's AdamW part
    weight_decay: float = 0.1  # on matrices only, embeddings included; never on biases, norms
    grad_clip: float = 1.0  # largest global gradient norm; 0: no clipping
    schedule: Schedule = Schedule.cosine  # after the warm-up, over the steps of the run
    warmup_steps: int = 10
    decay_fraction: float = 0.2  # of the steps after the warm-up, at their end: the decay of wsd; above 0, to 1
    min_lr_ratio: float = 0.1  # of the peak, at the end of the schedule
    # Decay rate of a moving average of the weights, which is what is evaluated and exported; in [0, 1); 0: none
    ema_decay: float = 0.0

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, lr=0, eps=0, weight_decay=0, grad_clip=0, warmup_steps=0, min_lr_ratio=0)
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas)):
            yield "betas", f"must be two numbers in [0, 1), is {self.betas}", "For example [0.9,0.95]."
        if not 0 < self.decay_fraction <= 1:
            yield "decay_fraction", f"must be above 0 and at most 1, is {self.decay_fraction}", "For example 0.2."
        if not 0 <= self.ema_decay < 1:
            yield "ema_decay", f"must be in [0, 1), is {self.ema_decay}", "For example 0.999; 0 for none."
