"""A moving average of the weights (Polyak and Juditsky 1992): what is evaluated and exported where `optim.ema_decay` is
set.

It lives in the optimizer's own state, one fp32 tensor beside each weight that the optimizer holds. So it is whole in
one process and sharded under ZeRO, of the fp32 masters where the forward runs in bf16, on the device where the other
state is, and in every checkpoint, without a line of code for any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NAME = "average"  # its key in the optimizer's state


def average_decay(ema_decay: float, num_updates: int) -> float:
    """The decay of an update after `num_updates` others: 0 at first, so that the average starts as the weights after one
    step, then min(ema_decay, (1 + n) / (10 + n)) with n from 0. Without that rise a run that is short against
    1 / (1 - ema_decay) steps would end with much of its initial weights in the average."""
    return min(ema_decay, num_updates / (num_updates + 9))


class WeightAverage:
    """The average of all weights that an optimizer holds, or, at a decay of 0, nothing."""

    def __init__(self, decay: float, optimizer: torch.optim.Optimizer, spread: Callable[[], None] | None = None):
        """`spread` brings the optimizer's weights to where the forward reads them, if these are two places."""
        self.decay, self.optimizer, self.spread = decay, optimizer, spread
        self._is_in = False

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Take in the weights after an optimizer step that had `num_steps` before it."""
        self.begin()
        if pairs := self._pairs():
            weights, averages = map(list, zip(*pairs, strict=True))
            torch._foreach_lerp_(averages, weights, 1 - average_decay(self.decay, num_steps))

    def begin(self) -> None:
        """Give every weight that the optimizer has stepped an average, which starts as the weight itself. Not sooner: Adam
        would take a state with an average in it for one that it has initialised."""
        for weight, state in self.optimizer.state.items() if self.decay else ():
            if state and NAME not in state:
                state[NAME] = weight.detach().clone()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Collective. Inside, the model is its average (before the first step: itself); afterwards it is what it was,
        bit for bit. A second one inside changes nothing."""
        if not self.decay or self._is_in:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._is_in = not self._is_in
        for weight, average in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
        if self.spread is not None:
            self.spread()

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(weight, state[NAME]) for weight, state in self.optimizer.state.items() if NAME in state]
