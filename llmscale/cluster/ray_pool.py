"""A pool of Ray actors: the calls that wait for its workers, and what becomes of them when one is lost.

Units of work have one queue a pool, calls of every worker one queue a worker, and each worker a thread of the driver that hands
it the next (`ray_worker.py`), so that no worker waits for what the driver does elsewhere. What a call makes stays on the
worker's node until somebody asks for it.

A pool whose workers know nothing of each other *heals*: another worker takes the place of one that is lost, and the call that
it was at is made again, whole. In the others a lost worker ends the work of all: every call that waits, and every later one,
raises WorkerLostError, and whoever opened the pool goes back to a checkpoint.

An *elastic* pool begins with `fewest` workers and takes more, up to `most`, as Ray finds places, each when it has what is
installed: until then they wait in Ray, for which an autoscaler may add nodes. As long as `fewest` are up it does without one
that is lost, or has not come: nobody waits for its calls. Below that, and so in every other pool, a lost one is waited for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from llmscale.cluster.config import ClusterConfig, PoolConfig, Transport
from llmscale.cluster.pool import Doing, Event, Instead, Rest, WorkerPool
from llmscale.cluster.ray_calls import Call, Calls, Parts
from llmscale.cluster.ray_worker import NODE_LOST, NOWHERE, TICK_S, Closed, Fault, RayWorker
from llmscale.cluster.restarts import Restarts
from llmscale.errors import ClusterError, LlmscaleError, SetAsideError, WorkerError, WorkerLostError

HEALING = (
    "reference",
    "reward",
    "rollout",
)  # they know nothing of other ranks, and have no state but what is installed
MAX_DEATHS = 3  # of workers over one unit, which is then set aside


class RayPool(WorkerPool):
    """The pool of one role, in one placement group; an elastic one has none."""

    ahead = 8
    build: Callable[[], Any]

    def __init__(
        self,
        role: str,
        config: PoolConfig,
        cluster: ClusterConfig,
        group: PlacementGroup | None,
        log_dir: str,
        event: Event,
    ):
        self.role, self.group, self.placement = role, group, config.placement
        self.fewest, self.num_workers = config.fewest, config.most
        self.log_dir, self.event = log_dir, event
        self.threads, self.start_timeout_s = cluster.threads_per_worker, cluster.start_timeout_s
        # Ranks of a supervised stage watch each other, and know more: training/watchdog.py.
        self.answer_timeout_s = cluster.answer_timeout_s if role != "trainer" else None
        self.resources = {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus, "resources": dict(config.resources)}
        self.heals = _heals(role, cluster)
        self.restarts = Restarts(cluster.max_restarts)
        self.queue: deque[Call] = deque()  # of units, for whichever worker is free
        self.installed: tuple[str, list[Any]] | None = None
        self.closed = False
        self.broken: LlmscaleError | None = None  # why it takes no more work
        self.changed = threading.Condition()  # of all of these, and of the workers' calls
        self.workers = [RayWorker(self, bundle) for bundle in range(self.num_workers)]

    @property
    def members(self) -> list[str]:
        return [worker.actor._actor_id.hex() for worker in self.workers if worker.is_up]

    @property
    def is_elastic(self) -> bool:
        return self.fewest < self.num_workers

    @property
    def num_up(self) -> int:
        return sum(worker.is_up for worker in self.workers)

    @property
    def is_short(self) -> bool:
        """Whether it cannot do without those that are not up."""
        return self.num_up < self.fewest

    def start(self, build: Callable[[], Any]) -> list[ray.ObjectRef]:
        """Begin to build the role on every worker; returns what `started` waits for."""
        self.build = build
        if self.is_elastic:
            for worker in self.workers:
                worker.thread.start()
            return []
        arrivals = self._get([worker.actor.arrive.remote() for worker in self.workers])
        nodes = [arrival.node for arrival in arrivals]
        # Ranks of a host follow each other, as under torchrun: parallelism within a host counts on it.
        order = sorted(range(self.num_workers), key=lambda i: nodes.index(nodes[i]))
        self.workers, nodes = [self.workers[i] for i in order], [nodes[i] for i in order]
        for rank, (worker, i) in enumerate(zip(self.workers, order, strict=True)):
            worker.rank, worker.arrival = rank, arrivals[i]
        (port,) = self._get([self.workers[0].actor.free_port.remote()])
        master = (self.workers[0].arrival.address, port)
        return [
            worker.build(self.num_workers, nodes[:rank].count(nodes[rank]), nodes.count(nodes[rank]), master)
            for rank, worker in enumerate(self.workers)
        ]

    def started(self, building: list[ray.ObjectRef]) -> None:
        """Wait until every worker has built its role, or as many as are needed; from then on they take calls."""
        if self.is_elastic:
            self._enough()
            return
        self._get(building)
        for worker in self.workers:
            worker.is_up = True
            worker.thread.start()

    def call(self, method: Callable[..., Any], *args: Any) -> Calls:
        return self._call(method, args, keep=False)

    def install(self, method: Callable[..., Any], *args: Any) -> Calls:
        return self._call(method, args, keep=True)

    def map(self, method: Callable[..., Any], items: Sequence[Any]) -> Parts:
        # In a row, so that the samples of a prompt, which share it, stay together.
        assert not self.is_elastic, "a part is for one worker, which may leave"
        cuts = [rank * len(items) // self.num_workers for rank in range(self.num_workers + 1)]
        parts = [list(items[start:stop]) for start, stop in pairwise(cuts)]
        return Parts(Calls([self._add(Call(self, method.__name__, [part], r)) for r, part in enumerate(parts)]))

    def submit(
        self, method: Callable[..., Any], *args: Any, instead: Instead | None = None, rest: Rest | None = None
    ) -> Call:
        for arg in args:
            if isinstance(arg, Call) and (error := arg.exception()) is not None:
                raise error
        return self._add(Call(self, method.__name__, args, instead=instead, rest=rest))

    def aside(self, method: Callable[..., Any], *args: Any) -> None:
        for worker in filter(lambda worker: worker.is_up, self.workers):
            # A thread each, for one that hangs is not waited for.
            threading.Thread(target=worker.tell, args=(method.__name__, args), daemon=True).start()

    def doing(self) -> list[Doing]:
        found = [worker for worker in self.workers if worker.arrival is not NOWHERE]
        return [worker.doing() for worker in found if worker.is_up or self.is_short]

    def num_waiting(self) -> int:
        with self.changed:
            return len(self._waiting())

    def close(self) -> None:
        """End the workers, and what they are about."""
        with suppress(Closed):
            self.closed = True
            self.fail(WorkerLostError("its pool was closed", where=self.role))
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            if worker.thread.ident is not None:
                worker.thread.join()

    # ---------------------------------------------------------------- what the threads of the workers ask

    def next_call(self, worker: RayWorker) -> Call | None:
        """What a worker does next; None: nothing, for a while. Raises: Closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.broken or worker.calls or self.queue, TICK_S)
            if self.closed or self.broken:
                raise Closed
            source = worker.calls or self.queue
            return source.popleft() if source else None

    def put_back(self, call: Call) -> None:
        """To be made again, before any other."""
        with self.changed:
            if self.broken is None:
                (self.queue if call.rank is None else self.workers[call.rank].calls).appendleft(call)
                self.changed.notify_all()
                return
        self._refuse(call)

    def submit_again(self, call: Call) -> Call:
        """What it made is lost. Raises: WorkerLostError, where that was more than a result."""
        if not self.heals:
            what = f"what {call.method} made is lost, with the node that held it"
            raise WorkerLostError(what, where=f"{self.role} {call.rank}")
        return self._add(Call(self, call.method, call.args, call.rank, call.instead, call.rest))

    def lost(self, worker: RayWorker, call: Call | None, fault: Fault) -> None:
        """What becomes of a call whose worker is lost. Raises: Closed, where the worker is not to be replaced."""
        doing = {"at": call.method} if call is not None else {}
        if not self.heals:
            error = WorkerLostError(fault.what, where=worker.where, fix=worker.fix)
            error.cause = fault.cause
            if call is not None:
                call.set_exception(error)
            self.fail(error)
        with self.changed:
            was_up, worker.is_up = worker.is_up, False
        may_go = was_up and not self.is_short and fault.cause == NODE_LOST  # for hosts come and go
        left = self.restarts.limit if may_go else self.restarts.take(worker.where, fault.cause)
        is_aside = call is not None and self._once_more(call, worker.where, fault.cause)
        about = {"where": worker.where, "cause": fault.cause, "why": fault.what, **doing}
        self.event("worker_lost", **about, restarts_left=left)
        if not left and not is_aside and not may_go:
            what = f"{fault.what}, after {self.restarts.limit} restarts within an hour ({fault.cause})"
            self.fail(WorkerError(what, where=worker.where, fix=f"{worker.fix}. Or raise cluster.max_restarts."))
        if was_up and not self.is_short:
            self._excuse()
            self.event("worker_left", where=worker.where, workers=self.num_up)

    def fail(self, error: LlmscaleError) -> NoReturn:
        """Take no more work. Raises: Closed, always."""
        with self.changed:
            self.broken = self.broken or error
            waiting = self._waiting()
            for queue in (self.queue, *(worker.calls for worker in self.workers)):
                queue.clear()
            self.changed.notify_all()
        for call in waiting:
            self._refuse(call)
        raise Closed

    def is_install(self, call: Call) -> bool:
        """Whether it brings the newest state that every worker has to have."""
        return (call.method, call.args) == self.installed

    def place_of(self, worker: RayWorker) -> tuple[int, int]:
        """A free local rank on the node of a worker that takes another's place, and how many of the pool are there."""
        others = {w.local_rank for w in self.workers if w is not worker and w.arrival.node == worker.arrival.node}
        return min(set(range(len(others) + 1)) - others), len(others) + 1

    def join(self, worker: RayWorker) -> tuple[str, list[Any]] | None:
        """A worker has built its role, and is one of them: calls of all are for it too. Returns the state that it lacks, and
        that is not among the calls that wait for it."""
        with self.changed:
            worker.is_up = True
            self._excuse()
            waits = any(map(self.is_install, worker.calls))
            return None if waits else self.installed

    def came(self, worker: RayWorker, cause: str | None, seconds: float) -> None:
        """It has that state. `cause`: of the loss of the one before."""
        about = {"where": worker.where, "pid": worker.arrival.pid, "seconds": seconds}
        if self.is_elastic:
            self.event("worker_joined", **about, workers=self.num_up)
        else:
            self.event("worker_replaced", **about, cause=cause)
        with self.changed:
            self.changed.notify_all()

    # ---------------------------------------------------------------- inside

    def _call(self, method: Callable[..., Any], args: Sequence[Any], keep: bool) -> Calls:
        shared = [ray.put(arg) for arg in args]  # once, not once a worker
        with self.changed:  # a worker that comes up now has either both of these or none
            if keep:
                self.installed = (method.__name__, shared)
            meant = [worker for worker in self.workers if worker.is_up or self.is_short]
            return Calls([self._add(Call(self, method.__name__, shared, worker.rank)) for worker in meant])

    def _add(self, call: Call) -> Call:
        with self.changed:
            if self.broken is None:
                (self.queue if call.rank is None else self.workers[call.rank].calls).append(call)
                self.changed.notify_all()
                return call
        self._refuse(call)
        return call

    def _excuse(self) -> None:
        """Nobody waits for workers that the pool can do without."""
        with self.changed:
            for worker in self.workers:
                while worker.calls and not worker.is_up and not self.is_short:
                    worker.calls.popleft().excuse()

    def _enough(self) -> None:
        """Raises: ClusterError when not as many as are needed come up; what one of them raised."""
        with self.changed:
            self.changed.wait_for(lambda: self.broken or not self.is_short, self.start_timeout_s)
        if self.broken is not None:
            raise self.broken
        if self.is_short:
            what = f"{self.num_up} workers came up in {self.start_timeout_s:g} s (cluster.start_timeout_s), "
            what += f"at least {self.fewest} are needed"
            fix = "Lower min_workers or what each worker gets, or add nodes; `ray status` says what is free."
            raise ClusterError(what, where=f"cluster.{self.role}.min_workers", fix=fix)

    def _waiting(self) -> list[Call]:
        return [*self.queue, *(call for worker in self.workers for call in worker.calls)]

    def _refuse(self, call: Call) -> None:
        assert self.broken is not None
        if call.running() or call.set_running_or_notify_cancel():
            call.set_exception(self.broken)

    def _once_more(self, call: Call, where: str, cause: str) -> bool:
        """Put a call back whose worker was lost. True: it was a unit, and is set aside instead; it is to blame, not they."""
        call.victims.append((where, cause))
        if call.rank is not None or len(call.victims) < MAX_DEATHS:
            self.put_back(call)
            return False
        for victim in call.victims:
            self.restarts.give_back(*victim)
        who = ", ".join(f"{where} ({cause})" for where, cause in call.victims)
        what = f"{len(call.victims)} workers were lost over this unit of {call.method}: {who}"
        if call.instead is None:
            call.set_exception(SetAsideError(what, where=self.role, fix="Their logs may say why."))
        else:
            args = [arg.result() if isinstance(arg, Call) else arg for arg in call.args]
            call.set_result(ray.put(call.instead(*args, what)))
        self.event("unit_set_aside", where=self.role, why=what)
        return True

    def _get(self, refs: list[ray.ObjectRef]) -> list[Any]:
        """Results in order, while the pool comes up; the first failure of any of them at once, for its peers may wait for
        it for ever."""
        deadline = time.monotonic() + self.start_timeout_s
        pending = dict(zip(refs, self.workers, strict=False))
        results: dict[ray.ObjectRef, Any] = {}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                worker = next(iter(pending.values()))
                what = f"did not come up in {self.start_timeout_s:.0f} s (cluster.start_timeout_s)"
                raise WorkerError(what, where=self.role)
            worker = pending.pop(ready[0])
            try:
                results[ready[0]] = ray.get(ready[0])
            except RayTaskError as error:
                raise worker.explained(error) from error
            except RayError as error:
                what = "this worker died" if isinstance(error, RayActorError) else str(error)
                raise WorkerLostError(what, where=worker.where, fix=worker.fix) from error
        return [results[ref] for ref in refs]


def _heals(role: str, cluster: ClusterConfig) -> bool:
    """A worker that takes another's place needs the weights of the last publication, which a broadcast does not leave behind,
    and a device of its own: whose turn it is with a shared one, the driver alone knows."""
    broadcast = role == "rollout" and cluster.carried_by is Transport.broadcast
    return role in HEALING and role not in cluster.colocated and not broadcast
