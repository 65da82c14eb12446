"""Who has the devices that roles share (`cluster.colocated`): the rollouts while they sample, everybody else while there is
scoring, training and saving. Whose shift it is not sleeps, its weights and what belongs to them in host memory.

The driver asks for a shift wherever one is needed; where it has begun already, or nothing is shared, that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llmscale.cluster.pool import WorkerPool
from llmscale.stages.roles import Colocatable

ROLLOUT = "rollout"


class Shifts:
    """All begin asleep."""

    def __init__(self, colocated: Sequence[str], pools: Mapping[str, WorkerPool], event: Callable[..., None]):
        self.pools, self.event = pools, event
        self.rollout = [name for name in colocated if name == ROLLOUT]
        self.training = [name for name in colocated if name != ROLLOUT]
        self.awake: list[str] = []
        self.freed: dict[str, int] = {}  # bytes of a device, by role, when it first went to sleep

    def of_rollouts(self) -> None:
        self._change(self.rollout)

    def of_training(self) -> None:
        self._change(self.training)

    def _change(self, coming: Sequence[str]) -> None:
        if self.awake == coming:
            return
        for name in self.awake:  # one by one, so that each can say what it freed
            self._tell(name, min(self.pools[name].call(Colocatable.sleep).wait()))
        for call in [self.pools[name].call(Colocatable.wake) for name in coming]:
            call.wait()
        self.awake = list(coming)

    def _tell(self, name: str, freed: int) -> None:
        if name not in self.freed:
            self.freed[name] = freed
            self.event("colocated", role=name, freed_bytes=freed, note="" if freed else "on a CPU nothing is moved")
