"""Steps that would do harm: a loss or gradient norm that is not finite, or far above those of the last steps.

Such a step is *skipped*: the engine asks before it changes anything (`TrainEngine.step`), and every rank refuses alike,
since the loss and the norm are sums over all ranks. What a skipped step means exactly:

- weights, optimizer state (Adam's step count too) and EMA stay as they are;
- the step counter goes on, and with it the position in the data and the learning rate: the step's examples are used up.

More than `max_skipped_steps` skipped of any WINDOW_STEPS steps say that the trouble is in the weights and not in one batch.
Then the run is *rolled back*: weights, optimizer and run state are those of the newest checkpoint, while the step counter
stays where it is, so that training goes on past the data that it met in between, with the learning rate of the later step
(as PaLM did, Chowdhery et al. 2022, section 5.1: restart before the spike, skip the batches around it). To repeat
the same steps on the same data would only fail again in the same way. After `max_rollbacks` of them the run stops.

A spike is a value above mean + `spike_threshold` standard deviations (of a sample: ddof=1) of the last WINDOW_STEPS steps that
were taken, once there are MIN_STEPS of them. OLMo 2 (2025) skips steps by the same rule, with 6 deviations and 128 steps.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from llmscale.engine.accounting import DIVERGED, not_finite
from llmscale.errors import NumericsError
from llmscale.training.config import TrainingConfig

WINDOW_STEPS = 128
MIN_STEPS = 32
SHOWN = 20  # of what happened, in the message
WATCHED = {"loss": "loss", "grad_norm": "gradient norm"}


class Guard:
    """`llmscale.protocols.Stateful`: what it decides after a restart is what it would have decided. `report` is told of every
    step that is skipped and every rollback: `report(kind, step=..., why=...)`."""

    def __init__(self, config: TrainingConfig, report: Callable[..., None] = lambda kind, **details: None):
        self.config, self._report = config, report
        self.refusal: str | None = None  # why the last step was skipped
        self.num_rollbacks = 0
        self._skipped: list[int] = []  # of the last WINDOW_STEPS
        self._history: list[str] = []
        self._taken = {name: deque[float](maxlen=WINDOW_STEPS) for name in WATCHED}

    def accept(self, metrics: Mapping[str, float]) -> bool:
        """Whether the engine may take the step that these numbers belong to."""
        self.refusal = not_finite(metrics) or self._spike(metrics)
        return self.refusal is None

    def settle(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Note what became of `step`; returns whether the run has to be rolled back.

        Raises: NumericsError when there was no good step to begin with, and when all rollbacks are used.
        """
        if self.refusal is None:
            for name, values in self._taken.items():
                values.append(metrics[name])
            return False
        self._skipped = [*(s for s in self._skipped if s > step - WINDOW_STEPS), step]
        self._history.append(f"step {step}: {self.refusal}")
        self._report("step_skipped", step=step, why=self.refusal)
        if not self._taken["loss"]:
            raise self.error()
        if len(self._skipped) <= self.config.max_skipped_steps:
            return False
        if self.num_rollbacks >= self.config.max_rollbacks:
            raise self.error()
        return True

    def roll_back(self, step: int, restore: Callable[[], int | None]) -> None:
        """`restore` loads the newest checkpoint, with the state of this object in it, and returns its step.

        Raises: NumericsError when there is none.
        """
        num_rollbacks, history = self.num_rollbacks, self._history
        found = restore()
        if found is None:
            raise self.error("; there is no checkpoint to go back to")
        self.num_rollbacks, self._history = num_rollbacks + 1, [*history, f"step {step}: rolled back to step {found}"]
        self._skipped = []
        self._report("rolled_back", step=step, to=found, why=self.refusal)

    def error(self, besides: str = "") -> NumericsError:
        """What happened, from the first to the last."""
        return NumericsError("; ".join(self._history[-SHOWN:]) + besides, where="optim.lr", fix=DIVERGED)

    def _spike(self, metrics: Mapping[str, float]) -> str | None:
        threshold = self.config.spike_threshold
        for name, values in self._taken.items():
            if threshold is None or len(values) < MIN_STEPS:
                continue
            # fsum: the same bits on every kind of machine, so that all ranks refuse alike.
            mean = math.fsum(values) / len(values)
            deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
            if metrics[name] > (limit := mean + threshold * deviation):
                return f"the {WATCHED[name]} is {metrics[name]:.6g}, above {limit:.6g} (training.spike_threshold)"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": list(self._skipped),
            "num_rollbacks": self.num_rollbacks,
            "history": self._history[-SHOWN:],
            "taken": {name: list(values) for name, values in self._taken.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skipped, self.num_rollbacks = list(state["skipped"]), state["num_rollbacks"]
        self._history = list(state["history"])
        self._taken = {name: deque(values, maxlen=WINDOW_STEPS) for name, values in state["taken"].items()}
