"""Which samples each step takes. The order is a pure function of (number of samples, seed, position), so the position
in the data is the step number alone, and the global batch is the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from llmscale.errors import DataError
from llmscale.randomness import permutation

T = TypeVar("T")


class SampleOrder:
    """The endless stream of one permutation after the other, an epoch each, cut into global batches. Another `stream` of the
    same seed has other permutations."""

    def __init__(self, num_examples: int, seed: int, stream: int = 0):
        if num_examples < 1:
            raise DataError("there are no examples to draw from")
        self.num_examples, self.seed, self.stream = num_examples, seed, stream
        self._latest = (
            -1,
            np.empty(0, dtype=np.int64),
        )  # an epoch and its order; one pair, because threads may share this

    def batch(self, step: int, global_batch_size: int) -> list[int]:
        """Indexes of global batch `step`; steps count from 0. A batch may reach over the end of an epoch."""
        start = step * global_batch_size
        return self.at(np.arange(start, start + global_batch_size)).tolist()

    def at(self, positions: np.ndarray) -> np.ndarray:
        """int64 [N] -> int64 [N]: the indexes of the samples at these positions of the stream."""
        epochs, offsets = np.divmod(positions, self.num_examples)
        indexes = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            indexes[here] = self._order_of(epoch)[offsets[here]]
        return indexes

    def _order_of(self, epoch: int) -> np.ndarray:
        known, order = self._latest
        if epoch != known:
            order = permutation(self.seed, "epoch", epoch, self.stream, size=self.num_examples)
            self._latest = epoch, order
        return order


def micro_batches(items: Sequence[T], micro_batch_size: int) -> list[list[T]]:
    """In order, the last one perhaps smaller."""
    return [list(items[start : start + micro_batch_size]) for start in range(0, len(items), micro_batch_size)]
