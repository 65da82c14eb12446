"""Refusing an optimizer's step at the last moment.

DeepSpeed knows the gradient norm only inside its own step, so whether a step is taken has to be decided where it calls the
optimizer, perhaps once for each group of parameters. A parameter without a gradient is left alone by every torch optimizer,
its weights, moments and step count; so a refused step is one that sees no gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Gate:
    """Lets the steps of one optimizer pass or not."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._verdict: Callable[[], bool] | None = (
            None  # None: not in a step; DeepSpeed makes one of its own when it starts
        )
        self._accepted: bool | None = None
        self._hidden: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def run(self, step: Callable[[], None], verdict: Callable[[], bool]) -> bool:
        """Run `step`, which may or may not call the optimizer; returns the verdict, asked for exactly once."""
        self._verdict, self._accepted = verdict, None
        try:
            step()
            return self._asked()
        finally:
            self._verdict = None

    def _asked(self) -> bool:
        if self._accepted is None:
            assert self._verdict is not None
            self._accepted = self._verdict()
        return self._accepted

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._verdict is not None and not self._asked():
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._hidden = [(p, p.grad) for p in parameters]
            for parameter in parameters:
                parameter.grad = None

    def _after(self, *_: object) -> None:
        for parameter, gradient in self._hidden:  # it may be a buffer that is used again
            parameter.grad = gradient
        self._hidden = []
