"""Over-optimisation: what the policy is trained on still rises while what it stands for falls (Gao et al. 2023,
arXiv:2210.10760, who plot both against the square root of the KL to the start).

The steps are put into parts of consecutive ones, and the part with the best true score is compared with the last. A difference
counts when it is above `SIGMAS` standard errors. A step's noise is that of its prompts and samples: half the mean square of the
difference between neighbouring steps (von Neumann 1941), which a slow trend does not touch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_PARTS = 10
STEPS_OF_A_PART = 4  # at least
SIGMAS = 3.0  # the best of ten equal parts is above the last by so much once in a hundred runs
LEARNED, TRUE, KL = "reward/mean", "reward/true", "kl/ref"


@dataclass(frozen=True)
class Part:
    """Means over some consecutive steps."""

    first_step: int
    last_step: int
    sqrt_kl: float  # of KL in nats per completion
    learned: float
    true: float


@dataclass(frozen=True)
class OverOptimisation:
    """`best`: the part with the highest true score. `fall` and `rise` are from there to the last part."""

    found: bool
    best: Part
    parts: list[Part]
    fall: float  # of the true score
    fall_error: float  # standard error
    rise: float  # of the learned reward
    rise_error: float

    @property
    def verdict(self) -> str:
        last = self.parts[-1]
        learned = f"learned reward {self.best.learned:.3f} -> {last.learned:.3f}"
        if not self.found:
            return f"no over-optimisation seen: true score {last.true:.3f}, at best {self.best.true:.3f}"
        where = f"after step {self.best.last_step} (sqrt KL {self.best.sqrt_kl:.2f})"
        return f"over-optimised {where}: true score {self.best.true:.3f} -> {last.true:.3f}, {learned}"

    def table(self) -> str:
        """Markdown."""
        lines = [
            f"{self.verdict[0].upper()}{self.verdict[1:]}.",
            "",
            f"From the best part to the last the true score fell by {self.fall:.4f} (standard error {self.fall_error:.4f}) and "
            f"the learned reward rose by {self.rise:.4f} ({self.rise_error:.4f}); both have to exceed {SIGMAS:g} errors.",
            "",
            "| steps | sqrt KL | learned reward | true score |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {p.first_step}-{p.last_step} | {p.sqrt_kl:.3f} | {p.learned:.4f} | {p.true:.4f} |" for p in self.parts
        ]
        return "\n".join(lines) + "\n"


def overoptimisation(metrics: Sequence[Mapping[str, Any]]) -> OverOptimisation | None:
    """metrics: the records of a run's metrics.jsonl. None without a true score, or with too few steps to tell."""
    steps = [m for m in metrics if all(m.get(name) is not None for name in (LEARNED, TRUE, KL))]
    num_parts = min(NUM_PARTS, len(steps) // STEPS_OF_A_PART)
    if num_parts < 2:
        return None
    cuts = np.array_split(np.arange(len(steps)), num_parts)
    learned, true, kl = (np.array([float(m[name]) for m in steps]) for name in (LEARNED, TRUE, KL))
    parts = [
        Part(
            first_step=int(steps[own[0]]["step"]),
            last_step=int(steps[own[-1]]["step"]),
            sqrt_kl=float(np.sqrt(max(0.0, kl[own].mean()))),  # its estimate may be below 0
            learned=float(learned[own].mean()),
            true=float(true[own].mean()),
        )
        for own in cuts
    ]
    index = int(np.argmax([part.true for part in parts]))
    best, last = parts[index], parts[-1]
    share = 1 / len(cuts[index]) + 1 / len(cuts[-1])
    fall_error, rise_error = (float(np.sqrt(_noise(series) * share)) for series in (true, learned))
    fall, rise = best.true - last.true, last.learned - best.learned
    found = fall > SIGMAS * fall_error and rise > SIGMAS * rise_error
    return OverOptimisation(found, best, parts, fall, fall_error, rise, rise_error)


def _noise(series: np.ndarray) -> float:
    """Variance of a step around the trend."""
    return float(np.square(np.diff(series)).mean() / 2)
