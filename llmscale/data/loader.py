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
    """The endless stream of one permutation after the other, an epoch each, cut into global batches."""

    def __init__(self, num_examples: int, seed: int):
        if num_examples < 1:
            raise DataError("there are no examples to draw from")
        self.num_examples, self.seed = num_examples, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int, global_batch_size: int) -> list[int]:
        """Indexes of global batch `step`; steps count from 0. A batch may reach over the end of an epoch."""
        start = step * global_batch_size
        return [self._at(position) for position in range(start, start + global_batch_size)]

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_examples)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, permutation(self.seed, "epoch", epoch, size=self.num_examples)
        return int(self._order[offset])


def shard(items: Sequence[T], rank: int, world_size: int) -> list[T]:
    """This rank's part; the parts of all ranks are the whole, and differ in size by one at most."""
    return list(items[rank::world_size])


def micro_batches(items: Sequence[T], micro_batch_size: int) -> list[list[T]]:
    """In order, the last one perhaps smaller."""
    return [list(items[start : start + micro_batch_size]) for start in range(0, len(items), micro_batch_size)]
