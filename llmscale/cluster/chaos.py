"""Faults on purpose: workers of a run are killed, stopped for good or delayed, to see that it goes on. Which, and when, is a
function of the seed. A tool for tests: `chaos=all`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from llmscale.cluster.config import ChaosConfig
from llmscale.cluster.pool import Event, WorkerPool


@dataclass(frozen=True)
class Planned:
    """One fault."""

    after_s: float  # after the one before it
    action: str  # kill, stop or delay
    role: str
    share: float  # of the pool's workers that come before the one that is hit, 0..1


def schedule(config: ChaosConfig, roles: Collection[str], begin: int = 0) -> Iterator[Planned]:
    """The faults of a run with these roles in order, from number `begin` on; the times between them are exponential."""
    faults = config.of(roles)
    while faults:
        random = np.random.default_rng([config.seed, begin])
        action, role = faults[random.integers(len(faults))]
        yield Planned(random.exponential(config.every_s), action, role, random.random())
        begin += 1


class Chaos:
    """While the context is open. `begin`: how many faults the run has had; `event` is told of each."""

    def __init__(self, config: ChaosConfig, pools: Mapping[str, WorkerPool], begin: int, event: Event):
        self.config, self.pools, self.begin, self.event = config, pools, begin, event
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.thread.join()

    def _run(self) -> None:
        # Here, for Ray reads its environment when it is first imported; by now the pools are open.
        import ray
        from ray.exceptions import RayError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        hurt = ray.remote(num_cpus=0, max_retries=0)(_hurt)
        for fault in schedule(self.config, sorted(self.pools), self.begin):
            if self.closed.wait(fault.after_s):
                return
            doing = self.pools[fault.role].doing()
            hit = doing[int(fault.share * len(doing))]
            self.event("chaos", action=fault.action, where=hit.where, pid=hit.pid, at=hit.method)
            on_its_node = NodeAffinitySchedulingStrategy(hit.node, soft=False)
            try:
                there = hurt.options(scheduling_strategy=on_its_node)
                ray.get(there.remote(hit.pid, fault.action, self.config.delay_s))
            except RayError:  # its node is gone already
                continue


def _hurt(pid: int, action: str, delay_s: float) -> None:
    try:
        os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        if action == "delay":
            time.sleep(delay_s)
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:  # another fault was faster
        return
