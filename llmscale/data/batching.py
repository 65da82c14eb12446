"""How the examples of a step become each rank's micro-batches, and preparing them while the step before still runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from llmscale.packing import balanced, like_lengths

T = TypeVar("T")


@dataclass(frozen=True)
class TokenBudget:
    """What one forward and backward on one rank may hold."""

    tokens: int  # of a micro-batch; where rows are padded, padding counts
    packed: bool  # whether sequences share one row, or have a row each

    @property
    def row_tokens(self) -> int:
        """For `Objective.prepare`."""
        return self.tokens if self.packed else 0

    def parts(self, lengths: Sequence[int] | np.ndarray, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """This rank's micro-batches of one step, as indexes into `lengths` (tokens of each example of the whole step).
        Every rank gets as many, and of nearly the same size; how examples are dealt out changes no number."""
        partition = balanced if self.packed else like_lengths
        return partition(lengths, self.tokens, world_size)[rank::world_size]


class Prefetcher(Generic[T]):
    """`make(step)` with the next step's result being made in a thread meanwhile. `make` must be a pure function.

    Only steps below `num_steps` are made in advance."""

    def __init__(self, make: Callable[[int], T], num_steps: int):
        self._make, self._num_steps = make, num_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[int, Future[T]] = {}

    def __call__(self, step: int) -> T:
        ahead = self._ahead.pop(step, None)
        self._ahead.clear()  # of a step that was rolled back
        result = ahead.result() if ahead else self._make(step)
        if step + 1 < self._num_steps:
            self._ahead[step + 1] = self._thread.submit(self._make, step + 1)
        return result

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
