"""How the examples of a step become each rank's micro-batches, and preparing them while the step before still runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from llmscale.batch import APART, Branch, Rows
from llmscale.packing import balanced, like_lengths

T = TypeVar("T")


@dataclass(frozen=True)
class TokenBudget:
    """What one forward and backward on one rank may hold."""

    tokens: int  # of a micro-batch; where rows are padded, padding counts
    packed: bool  # whether sequences share one row, or have a row each
    branching: bool = False  # whether those of a row that begin alike share that

    @property
    def rows(self) -> Rows:
        """For `Objective.prepare`."""
        return Rows(self.tokens, self.branching) if self.packed else APART

    def parts(
        self,
        lengths: Sequence[int] | np.ndarray,
        rank: int = 0,
        world_size: int = 1,
        branches: Sequence[Branch | None] | None = None,
    ) -> list[list[int]]:
        """This rank's micro-batches of one step, as indexes into `lengths` (tokens of each example of the whole step).
        Every rank gets as many, and of nearly the same size; how examples are dealt out changes no number. A trunk and its
        branches stay together as far as they fit."""
        if not self.packed:
            return like_lengths(lengths, self.tokens, world_size)[rank::world_size]
        trees = [[i] for i in range(len(lengths))]
        if self.branching and branches is not None:
            trees = _trees(lengths, branches, self.tokens)
        sizes = [sum(int(lengths[i]) for i in tree) - _shared(tree, branches) for tree in trees]
        dealt = balanced(sizes, self.tokens, world_size)[rank::world_size]
        return [[index for number in part for index in trees[number]] for part in dealt]


def _trees(lengths: Sequence[int] | np.ndarray, branches: Sequence[Branch | None], tokens: int) -> list[list[int]]:
    """Each trunk with its branches, cut where it would be more than `tokens`: the rest branches off its own first."""
    whole: dict[int, list[int]] = {}
    for index, branch in enumerate(branches):
        whole.setdefault(index if branch is None else branch.trunk, []).append(index)
    trees: list[list[int]] = []
    for tree in whole.values():
        room = 0
        for index in tree:
            branch = branches[index]
            own = int(lengths[index]) - (branch.shared if branch else 0)
            if own > room or branch is None:
                trees.append([])
                own, room = int(lengths[index]), tokens
            trees[-1].append(index)
            room -= own
    return trees


def _shared(tree: Sequence[int], branches: Sequence[Branch | None] | None) -> int:
    """Tokens that need not be computed again."""
    found = [branches[index] for index in tree[1:]] if branches else []
    return sum(branch.shared for branch in found if branch)


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
