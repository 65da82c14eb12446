"""Pools of workers, one pool a role. A worker is a plain object (a role); a pool calls its methods on several of them.

Methods are named by the function itself, `pool.call(PolicyRole.update, ...)`, never by a string, so that editors and type
checkers follow the call. Every call returns at once with a `Pending`; results come in the order of workers or units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmscale.cluster.config import ClusterConfig
from llmscale.cluster.environment import set_ray_environment

Event = Callable[..., None]  # a tracker's, called from any thread: kind, and details by name
Instead = Callable[..., Any]  # what a unit was called with, and why there is no result -> what stands for it
Rest = Callable[
    ..., Any
]  # what a unit was called with, and its result -> what is left to call with; None: it has ended


class Pending(Protocol):
    """Work that was started."""

    def wait(self) -> list[Any]:
        """Results in order.

        Raises: the worker's own LlmscaleError, or a WorkerError that names role and rank.
        """
        ...


@dataclass(frozen=True)
class Doing:
    """What a worker is about."""

    where: str  # role and rank
    pid: int
    node: str  # Ray's id of it
    method: str  # that it was called for; "": it is free
    since_s: float  # `time.monotonic()` when that began
    moved_s: float  # the same, when a phase of the worker last ended, as far as is known
    inside: str  # the phases that it is in
    raised: tuple[float, str] | None  # the first that its role raised: when, and the traceback


class WorkerPool(ABC):
    """`num_workers` workers that each hold one role object."""

    num_workers: int
    ahead: int  # times the workers: units of a stream that are begun and not yet taken, so that a slow one stops nobody soon

    @property
    @abstractmethod
    def members(self) -> Sequence[str]:
        """Who the workers are: another one in the place of one that died has another name."""

    @abstractmethod
    def call(self, method: Callable[..., Any], *args: Any) -> Pending:
        """The same call on every worker; one result a worker. Collective methods of roles are called this way."""

    @abstractmethod
    def install(self, method: Callable[..., Any], *args: Any) -> Pending:
        """The same call on every worker, and, before anything else, on each that takes another's place later: state that
        units count on. The last one that was installed holds."""

    @abstractmethod
    def map(self, method: Callable[..., Any], items: Sequence[Any]) -> Pending:
        """`method(part)` on every worker with its part of the items, even an empty one; one result an item, in order."""

    @abstractmethod
    def submit(
        self, method: Callable[..., Any], *args: Any, instead: Instead | None = None, rest: Rest | None = None
    ) -> Future[Any]:
        """`method(*args)` on whichever worker is free first; units begin in the order in which they are handed in. An
        argument may be a unit of another pool that has ended well: its result then goes from worker to worker, and not
        through the driver. What a unit makes must not depend on the number of workers.

        `instead` makes what stands for the result where worker after worker was lost over the unit; else that is a
        SetAsideError. `rest`, for a method of one argument, says what is left of a unit that was broken off: it goes on
        with that before any other begins, on whichever worker is free first, unless there is state to be installed."""

    @abstractmethod
    def aside(self, method: Callable[..., Any], *args: Any) -> None:
        """The same call on every worker, at once, in another thread of a worker that is about something. Nobody waits for
        it, and it may come late or, to a worker that is about to be lost, never. `args`: JSON."""

    def doing(self) -> list[Doing]:
        """What each worker is about; nothing where workers are the driver itself."""
        return []

    def num_waiting(self) -> int:
        """Calls that no worker has begun."""
        return 0

    def units(self, method: Callable[..., Any], units: Iterable[Any], instead: Instead | None = None) -> Units:
        """`submit` of each unit; one result a unit, in order."""
        return Units([self.submit(method, unit, instead=instead) for unit in units])

    def stream(self, method: Callable[..., Any], units: Iterable[Any]) -> Iterator[Any]:
        """The same for more units than memory holds: results one by one, in the order of the units, which are taken as
        workers become free. A unit that takes long holds up results, and in the end work, but never their number."""
        begun: deque[Future[Any]] = deque()
        try:
            for unit in units:
                begun.append(self.submit(method, unit))
                if len(begun) >= self.ahead * self.num_workers:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for task in begun:
                task.cancel()


@dataclass
class Units:
    """Units of work that were handed in."""

    tasks: list[Future[Any]]

    def wait(self) -> list[Any]:
        """Results in order. Raises: what the first unit that failed did; those that have not begun are then given up."""
        done, waiting = wait(self.tasks, return_when=FIRST_EXCEPTION)
        for task in waiting:
            task.cancel()
        failed = next((task for task in done if task.exception()), None)
        return [failed.result()] if failed is not None else [task.result() for task in self.tasks]


def newest_of(task: Future[Any]) -> Future[Any]:
    """The unit that made the task's result again, where that was lost with its node; else the task."""
    newest: Future[Any] = getattr(task, "newest", task)
    return newest


@contextmanager
def opened_pools(
    cluster: ClusterConfig,
    roles: Mapping[str, Callable[[], Any]],
    log_dir: Path,
    event: Event = lambda kind, **details: None,
) -> Iterator[Mapping[str, WorkerPool]]:
    """One pool for each role while the context is open; afterwards no worker is left. `roles` maps a role's name (a field
    of ClusterConfig) to what builds the role object on a worker; `event` is told of workers that are lost and replaced.

    Raises: ClusterError when the cluster lacks the resources.
    """
    one_each = all(getattr(cluster, name).most == 1 for name in roles)
    if cluster.one_process and one_each:
        from llmscale.cluster.local import LocalPool

        yield {name: LocalPool(name, build) for name, build in roles.items()}
        return
    set_ray_environment(own_cluster=cluster.address is None)
    from llmscale.cluster.ray import opened_ray_pools

    with opened_ray_pools(cluster, roles, str(log_dir.resolve()), event) as pools:
        yield pools
