"""Faults on purpose, to see that a run goes on: workers are killed, stopped or delayed, hosts cut off, weights damaged, the
disk filled. Which, and when, is a function of the seed. A tool for tests: `chaos=all`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmscale.cluster.config import ChaosConfig
from llmscale.cluster.faults import cut, filled, hurt
from llmscale.cluster.intake import Intake
from llmscale.cluster.pool import Doing, Event, WorkerPool

PATIENCE_S = 10.0  # for a process of a host to come up that does it


@dataclass(frozen=True)
class Planned:
    """One fault."""

    after_s: float  # after the one before it
    action: str  # kill, stop, delay, cut, corrupt or fill
    role: str  # "": no worker is hit
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

    def __init__(self, config: ChaosConfig, pools: Mapping[str, WorkerPool], begin: int, event: Event, run_dir: Path):
        self.config, self.pools, self.begin, self.event, self.run_dir = config, pools, begin, event, run_dir
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="chaos", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.thread.join()

    def _run(self) -> None:
        for fault in schedule(self.config, sorted(self.pools), self.begin):
            if self.closed.wait(fault.after_s):
                return
            if fault.action == "fill":
                self._fill()
            elif fault.action == "corrupt":
                self._corrupt(fault)
            else:
                self._hit(fault)

    def _fill(self) -> None:
        self.event("chaos", action="fill", where=str(self.run_dir))
        try:
            with filled(self.run_dir):
                self.closed.wait(self.config.delay_s)
        except OSError as error:
            self.event("chaos_failed", action="fill", where=str(self.run_dir), why=str(error))

    def _corrupt(self, fault: Planned) -> None:
        workers = self.pools[fault.role].doing()
        where = workers[int(fault.share * len(workers))].where
        self.event("chaos", action="corrupt", where=where)
        self.pools[fault.role].call(Intake.flip_next, where, fault.share)  # it does so when it is done with its unit

    def _hit(self, fault: Planned) -> None:
        # Here, for Ray reads its environment when it is first imported; by now the pools are open.
        import ray
        from ray.exceptions import RayError, RayTaskError
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        doing = self.pools[fault.role].doing()
        found = self._can_be_cut(doing) if fault.action == "cut" else doing
        if not found:
            why = "its hosts are those of the driver and of Ray's head"
            self.event("chaos", action=fault.action, where=fault.role, spared=why)
            return
        hit = found[int(fault.share * len(found))]
        self.event("chaos", action=fault.action, where=hit.where, pid=hit.pid, at=hit.method)
        on_its_node: Any = NodeAffinitySchedulingStrategy(hit.node, soft=False)
        there = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=on_its_node)
        if fault.action == "cut":
            address = next(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == hit.node)
            done = there(cut).remote(address, self.config.delay_s)
        else:
            done = there(hurt).remote(hit.pid, fault.action, self.config.delay_s)
        try:
            # A host that is cut off cannot say that it is.
            ray.get(ray.wait([done], timeout=self.config.delay_s + PATIENCE_S)[0])
        except RayTaskError as error:
            self.event("chaos_failed", action=fault.action, where=hit.where, why=str(error.cause))
        except RayError:  # its node is gone already
            return

    def _can_be_cut(self, doing: list[Doing]) -> list[Doing]:
        """Workers on other hosts than those without which there is no run."""
        import ray

        heads = {n["NodeID"] for n in ray.nodes() if "node:__internal_head__" in n["Resources"]}
        needed = heads | {ray.get_runtime_context().get_node_id()}
        return [worker for worker in doing if worker.node not in needed]
