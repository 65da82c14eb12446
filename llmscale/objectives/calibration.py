"""Whether a reward model's probabilities mean what they say: of the pairs (or steps) of which it is 80% sure, it should be
right about 80%.

The confidence in its own choice is sigmoid(|m|), m the log-odds that it gives to what people said: r_w - r_l of a pair (Bradley
and Terry 1952). Expected calibration error: sum over bins of share x |accuracy - mean confidence| (Guo et al. 2017,
arXiv:1706.04599, eq. 3), in equal bins from 0.5 to 1. Brier score (1950): mean (1 - sigmoid(m))^2, 0.25 for a coin. Log-loss in
nats: mean -log sigmoid(m), 0.69 for a coin. Legend: N pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_BINS = 10


@dataclass(frozen=True)
class Bin:
    """Those of a confidence from `low` up to `high`."""

    low: float
    high: float
    count: int
    confidence: float  # their mean
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    num: int
    ece: float
    brier: float
    log_loss: float
    bins: list[Bin]  # those that are not empty

    def metrics(self) -> dict[str, float]:
        return {"eval/ece": self.ece, "eval/brier": self.brier, "eval/log_loss": self.log_loss}

    def table(self, what: str) -> str:
        """Markdown. `what` was judged: pairs or steps."""
        lines = [
            f"{self.num} held-out {what}: expected calibration error {self.ece:.4f}, Brier score {self.brier:.4f}, "
            f"log-loss {self.log_loss:.4f} nats (a coin: 0.25 and 0.6931).",
            "",
            f"| confidence | {what} | mean confidence | right |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {b.low:.2f}-{b.high:.2f} | {b.count} | {b.confidence:.3f} | {b.accuracy:.3f} |" for b in self.bins
        ]
        return "\n".join(lines) + "\n"


def calibration(evidence: np.ndarray) -> Calibration:
    """evidence: float [N], log-odds of what was said; above 0 where the model agrees, and 0 counts as half right."""
    evidence = np.asarray(evidence, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(evidence)))
    right = np.where(evidence == 0, 0.5, evidence > 0)
    own = np.minimum(((confidence - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    edges = np.linspace(0.5, 1.0, NUM_BINS + 1)
    bins = [
        Bin(
            float(edges[b]),
            float(edges[b + 1]),
            int(n),
            float(confidence[own == b].mean()),
            float(right[own == b].mean()),
        )
        for b, n in enumerate(np.bincount(own, minlength=NUM_BINS))
        if n
    ]
    ece = sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / len(evidence)
    losses = np.logaddexp(0.0, -evidence)
    return Calibration(
        len(evidence), float(ece), float(((1 - np.exp(-losses)) ** 2).mean()), float(losses.mean()), bins
    )
