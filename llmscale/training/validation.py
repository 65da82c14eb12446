"""What the evaluations of a run say one after the other: how far training is ahead of validation, and when to stop."""

from __future__ import annotations

from typing import Any


class Validation:
    """`llmscale.protocols.Stateful`. `patience` is the number of evaluations without a new best loss after which the run
    ends (Prechelt 1998); None: it never does."""

    def __init__(self, patience: int | None):
        self._patience = patience
        self._best: float | None = None
        self._since_best = 0  # evaluations
        self._loss_sum, self._num_steps = 0.0, 0  # of training, since the last evaluation

    def trained(self, loss: float) -> None:
        """A step that was taken."""
        self._loss_sum += loss
        self._num_steps += 1

    def evaluated(self, loss: float) -> dict[str, float]:
        """`eval/gap`: this evaluation's loss minus the mean training loss since the one before, where there was any step."""
        gap = {"eval/gap": loss - self._loss_sum / self._num_steps} if self._num_steps else {}
        self._loss_sum, self._num_steps = 0.0, 0
        if self._best is None or loss < self._best:
            self._best, self._since_best = loss, 0
        else:
            self._since_best += 1
        return gap

    def ended(self) -> str | None:
        """Why there is nothing more to train for."""
        if self._patience is None or self._since_best < self._patience:
            return None
        return f"{self._since_best} evaluations without a better eval/loss than {self._best:.6g}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self._best,
            "since_best": self._since_best,
            "loss_sum": self._loss_sum,
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._since_best = state["best"], state["since_best"]
        self._loss_sum, self._num_steps = state["loss_sum"], state["num_steps"]
