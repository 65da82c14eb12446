"""A pool of Ray actors. An actor is a shell round a role: it sets up its process, builds the role and calls its methods.

Units of work have one queue a pool, and each worker a thread of the driver that hands it the next one, so that a unit never
waits for what the driver does elsewhere. What a unit makes stays on the worker's node until somebody asks for it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llmscale.cluster.config import PoolConfig
from llmscale.cluster.pool import WorkerPool
from llmscale.cluster.shell import Place, Shell
from llmscale.errors import LlmscaleError, WorkerError, WorkerLostError

DIED = "this worker died"
DEATH_IS_KNOWN_S = 5.0


@dataclass
class RayPending:
    pool: RayPool
    refs: list[ray.ObjectRef]
    ranks: list[int]

    def wait(self) -> list[Any]:
        return self.pool.get(self.refs, self.ranks)


@dataclass
class RayParts:
    """Results of parts that follow each other."""

    pending: RayPending

    def wait(self) -> list[Any]:
        return [result for part in self.pending.wait() for result in part]


class RayTask(Future[Any]):
    """It holds where the result lies; `result` fetches it."""

    def __init__(self, method: str, args: Sequence[Any]):
        super().__init__()
        self.method, self.args = method, args

    @property
    def ref(self) -> ray.ObjectRef:
        return super().result()

    def result(self, timeout: float | None = None) -> Any:
        return ray.get(super().result(timeout))


class RayPool(WorkerPool):
    """The pool of one role, in one placement group."""

    ahead = 8

    def __init__(self, role: str, config: PoolConfig, threads: int, group: PlacementGroup, log_dir: str):
        self.role, self.num_workers, self.group = role, config.num_workers, group
        self.log_dir = log_dir
        variables = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        resources = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "resources": dict(config.resources)}
        self.actors: list[Any] = [
            ray.remote(Shell)
            .options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
                runtime_env={"env_vars": variables},
                **resources,
            )
            .remote()
            for rank in range(self.num_workers)
        ]
        self.threads = threads
        self.queue: SimpleQueue[RayTask | None] = SimpleQueue()
        self.servers: list[threading.Thread] = []  # one a worker, from the first unit on
        self.serving = threading.Lock()  # units are handed in by threads of other pools too, where one follows another

    def start(self, build: Callable[[], Any], timeout_s: float) -> list[ray.ObjectRef]:
        """Begin to build the role on every worker; returns what to wait for."""
        ranks = list(range(self.num_workers))
        nodes = self.get([actor.node.remote() for actor in self.actors], ranks, timeout_s)
        # Ranks of a host follow each other, as under torchrun: parallelism within a host counts on it.
        order = sorted(ranks, key=lambda i: nodes.index(nodes[i]))
        self.actors, nodes = [self.actors[i] for i in order], [nodes[i] for i in order]
        (port,) = self.get([self.actors[0].free_port.remote()], [0], timeout_s)
        refs = []
        for rank, actor in enumerate(self.actors):
            local_rank, local_size = nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank])
            place = Place(rank, self.num_workers, local_rank, local_size, (nodes[0], port))
            log_file = f"{self.log_dir}/{self.role}-{rank}.log"
            refs.append(actor.build.remote(build, place, self.threads, os.getcwd(), log_file))
        return refs

    def call(self, method: Callable[..., Any], *args: Any) -> RayPending:
        shared = [ray.put(arg) for arg in args]  # once, not once a worker
        refs = [actor.call.remote(method.__name__, shared) for actor in self.actors]
        return RayPending(self, refs, list(range(self.num_workers)))

    def map(self, method: Callable[..., Any], items: Sequence[Any]) -> RayParts:
        # In a row, so that the samples of a prompt, which share it, stay together.
        cuts = [rank * len(items) // self.num_workers for rank in range(self.num_workers + 1)]
        parts = [list(items[start:stop]) for start, stop in pairwise(cuts)]
        refs = [a.call.remote(method.__name__, (part,)) for a, part in zip(self.actors, parts, strict=True)]
        return RayParts(RayPending(self, refs, list(range(self.num_workers))))

    def submit(self, method: Callable[..., Any], *args: Any) -> RayTask:
        task = RayTask(method.__name__, [arg.ref if isinstance(arg, RayTask) else arg for arg in args])
        self.queue.put(task)
        with self.serving:
            while len(self.servers) < self.num_workers:
                server = threading.Thread(target=self._serve, args=(len(self.servers),), name=self.role, daemon=True)
                self.servers.append(server)
                server.start()
        return task

    def close(self) -> None:
        """End the workers, and what they are about."""
        for _ in self.servers:
            self.queue.put(None)
        for actor in self.actors:
            ray.kill(actor)
        for server in self.servers:
            server.join()

    def _serve(self, rank: int) -> None:
        while (task := self.queue.get()) is not None:
            if not task.set_running_or_notify_cancel():
                continue
            try:
                call = self.actors[rank].call_apart.options(num_returns=2)
                ended, result = call.remote(task.method, task.args)
                ray.get(ended)
            except RayError as error:
                task.set_exception(self._explained(error, rank))
            else:
                task.set_result(result)

    def get(self, refs: list[ray.ObjectRef], ranks: list[int], timeout_s: float | None = None) -> list[Any]:
        """Results in order; the first failure of any of them at once, since its peers may wait for it for ever."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pending = dict(zip(refs, ranks, strict=True))
        results: dict[ray.ObjectRef, Any] = {}
        while pending:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=left)
            if not ready:
                rank = min(pending.values())
                what = f"did not come up in {timeout_s:.0f} s (cluster.start_timeout_s)"
                raise WorkerError(what, where=f"{self.role} {rank}", fix=self._see_log(rank))
            rank = pending.pop(ready[0])
            try:
                results[ready[0]] = ray.get(ready[0])
            except RayError as error:
                raise self._first_cause(self._explained(error, rank), pending) from error
        return [results[ref] for ref in refs]

    def _explained(self, error: RayError, rank: int) -> LlmscaleError:
        kind: type[WorkerError] = WorkerLostError
        if isinstance(error, RayTaskError):
            if isinstance(error.cause, LlmscaleError):
                return error.cause
            kind, what = WorkerError, f"{type(error.cause).__name__}: {error.cause}"
        elif isinstance(error, RayActorError):
            what = DIED
        else:
            what = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return kind(what, where=f"{self.role} {rank}", fix=self._see_log(rank))

    def _first_cause(self, error: LlmscaleError, pending: dict[ray.ObjectRef, int]) -> LlmscaleError:
        """A worker that lost its peers knows less than Ray does of the peer that died; the two are told at about the
        same time."""
        if not isinstance(error, WorkerLostError) or not pending:
            return error
        found: list[LlmscaleError] = [error]
        for ref in ray.wait(list(pending), num_returns=len(pending), timeout=DEATH_IS_KNOWN_S)[0]:
            try:
                ray.get(ref)
            except RayError as other:
                found.append(self._explained(other, pending[ref]))
        died = [e for e in found if type(e) is not WorkerLostError or e.what == DIED]
        return (died or found)[0]

    def _see_log(self, rank: int) -> str:
        return f"Its log: {self.log_dir}/{self.role}-{rank}.log"
