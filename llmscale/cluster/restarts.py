"""How often what was lost is started again."""

from __future__ import annotations

import time
from collections import defaultdict

WINDOW_S = 3600.0


class Restarts:
    """`limit` times an hour for each worker, or pool of ranks that train together, and each cause."""

    def __init__(self, limit: int):
        self.limit = limit
        self._taken_s: dict[tuple[str, str], list[float]] = defaultdict(list)

    def take(self, who: str, cause: str) -> int:
        """Take one; returns how many there were before. 0: it must not be started again."""
        now, taken = time.monotonic(), self._taken_s[who, cause]
        taken[:] = [at for at in taken if now - at < WINDOW_S]
        left = self.limit - len(taken)
        if left > 0:
            taken.append(now)
        return max(left, 0)

    def give_back(self, who: str, cause: str) -> None:
        """The last one was not this worker's fault."""
        if taken := self._taken_s[who, cause]:
            taken.pop()
