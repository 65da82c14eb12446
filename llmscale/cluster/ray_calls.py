"""Calls of Ray workers, and what those who wait for them get: results, or of several failures the one that knows most."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayError

from llmscale.cluster.pool import Instead, Rest
from llmscale.distributed import LOST_CONTACT
from llmscale.errors import WorkerLostError

if TYPE_CHECKING:
    from llmscale.cluster.ray_pool import RayPool

DEATH_IS_KNOWN_S = 5.0  # after its last connection has closed


class Call(Future[Any]):
    """A call of a worker. It holds where the result lies; `result` fetches it."""

    def __init__(
        self,
        pool: RayPool,
        method: str,
        args: Sequence[Any],
        rank: int | None = None,
        instead: Instead | None = None,
        rest: Rest | None = None,
    ):
        """`rank`: the one worker that it is for; None: any, for it is a unit."""
        super().__init__()
        self.pool, self.method, self.args, self.rank = pool, method, args, rank
        self.instead, self.rest = instead, rest
        self.victims: list[tuple[str, str]] = []  # workers that were lost while they were at it, and how
        self._again: Call | None = None
        self._lock = threading.Lock()

    @property
    def refs(self) -> list[Any]:
        """The arguments as the worker takes them: of a unit of another pool, where its result lies."""
        return [arg.newest.ref if isinstance(arg, Call) else arg for arg in self.args]

    @property
    def ref(self) -> ray.ObjectRef:
        return super().result()

    @property
    def newest(self) -> Call:
        """This call, or the one that made its result again."""
        return self if self._again is None else self._again.newest

    def result(self, timeout: float | None = None) -> Any:
        super().result(timeout)
        while True:
            newest = self.newest
            try:
                return ray.get(newest.ref)
            except ObjectLostError:  # with the node that held it
                newest.make_again()

    def excuse(self) -> None:
        """Its worker has left; there is no result."""
        self.set_result(None)

    def make_again(self) -> None:
        with self._lock:
            if self._again is None:
                self._again = self.pool.submit_again(self)


@dataclass
class Calls:
    """One call a worker; one result for each that has not left meanwhile."""

    tasks: list[Call]

    def wait(self) -> list[Any]:
        done, waiting = wait(self.tasks, return_when=FIRST_EXCEPTION)
        for task in self.tasks:
            if task in done and (error := task.exception()) is not None:
                raise _first_cause(error, [task for task in self.tasks if task in waiting])
        return [task.result() for task in self.tasks if task.ref is not None]


@dataclass
class Parts:
    """Results of parts that follow each other."""

    calls: Calls

    def wait(self) -> list[Any]:
        return [result for part in self.calls.wait() for result in part]


def _first_cause(error: BaseException, waiting: list[Call]) -> BaseException:
    """A worker that lost its peers knows less than Ray does of the peer that died; the two are told at about the same
    time."""
    if type(error) is not WorkerLostError or not waiting:
        return error
    found: list[BaseException] = [error]
    for call in wait(waiting, timeout=DEATH_IS_KNOWN_S)[0]:
        with suppress(RayError):
            other = call.exception()
            found += [other] if other is not None else []
    return min(found, key=_ignorance)


def _ignorance(error: BaseException) -> int:
    """Who died, the driver knows best; of the workers, those know least that only lost contact."""
    if type(error) is not WorkerLostError or error.cause != WorkerLostError.cause:
        return 0
    return 2 if error.what.startswith(LOST_CONTACT) else 1
