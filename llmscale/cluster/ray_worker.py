"""The driver's side of one Ray worker: a thread that hands it one call after another, notices when it dies or falls silent,
and, where its pool heals, puts another in its place, which gets the state that the others have before anything else.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llmscale import phases
from llmscale.cluster.config import Placement
from llmscale.cluster.pool import Doing
from llmscale.cluster.pulse import ask
from llmscale.cluster.ray_calls import DEATH_IS_KNOWN_S, Call
from llmscale.cluster.shell import Arrival, Place, Shell
from llmscale.errors import LlmscaleError, WorkerError, WorkerLostError

if TYPE_CHECKING:
    from llmscale.cluster.ray_pool import RayPool

DIED, HUNG, NODE_LOST, LATE = "died", "hung", "node lost", "late"  # the causes of a fault
COMING_UP = "coming up"
TICK_S = 1.0  # between two looks at a worker
NOWHERE = Arrival("", "", 0, ("", 0), "")  # of one that has not arrived yet


class Closed(Exception):
    """The pool has been closed."""


@dataclass
class Fault(Exception):
    """A worker is lost, through nothing that the role did."""

    cause: str
    what: str


class RayWorker:
    """The one of a pool with this rank, whichever process that is."""

    local_rank = 0
    arrival = NOWHERE
    actor: Any = None  # one that may come later has none yet
    is_up = False  # holds the role, and is given calls

    def __init__(self, pool: RayPool, bundle: int):
        """`bundle`: its place in the pool's placement group, where it has one."""
        self.pool, self.bundle = pool, bundle
        self.rank = bundle  # until it is known which share a node
        self.calls: deque[Call] = deque()  # for this worker alone; they come before any unit
        if not pool.is_elastic:
            self.actor = self._new_actor()
        self.method, self.since_s, self.moved_s, self.inside = "", time.monotonic(), 0.0, ""
        self.raised: tuple[float, str] | None = None
        self.refused: BaseException | None = None  # why it has not taken up the newest state
        self.thread = threading.Thread(target=self._serve, daemon=True)

    def build(self, size: int, local_rank: int, local_size: int, master: tuple[str, int]) -> ray.ObjectRef:
        """Begin to build the role."""
        self.local_rank = local_rank
        place = Place(self.pool.role, self.rank, size, local_rank, local_size, master)
        return self.actor.build.remote(self.pool.build, place, self.pool.threads, os.getcwd(), self.log_file)

    def doing(self) -> Doing:
        pid, node = self.arrival.pid, self.arrival.node
        # One that comes up has limits of its own, and is no sign that nothing moves.
        moved_s = time.monotonic() if self.method == COMING_UP else self.moved_s
        return Doing(self.where, pid, node, self.method, self.since_s, moved_s, self.inside, self.raised)

    def tell(self, method: str, args: Sequence[Any]) -> None:
        """Have a method of the role called whatever the worker is about; who does not answer is noticed elsewhere."""
        with suppress(OSError):
            ask(self.arrival.pulse, self.pool.answer_timeout_s or TICK_S, self.arrival.word, [method, *args])

    def kill(self) -> None:
        with suppress(RayError, ValueError):  # it may be gone, and Ray too
            if self.actor is not None:
                ray.kill(self.actor)

    @property
    def where(self) -> str:
        return f"{self.pool.role} {self.rank}"

    @property
    def log_file(self) -> str:
        return f"{self.pool.log_dir}/{self.pool.role}-{self.rank}.log"

    @property
    def fix(self) -> str:
        return f"Its log: {self.log_file}"

    def explained(self, error: RayTaskError) -> LlmscaleError:
        """What the role raised."""
        if isinstance(error.cause, LlmscaleError):
            return error.cause
        if isinstance(error.cause, ObjectLostError):
            return WorkerLostError("what it was to work on is lost, with the worker that made it", where=self.where)
        return WorkerError(f"{type(error.cause).__name__}: {error.cause}", where=self.where, fix=self.fix)

    def _new_actor(self) -> Any:
        pool = self.pool
        variables = {"OMP_NUM_THREADS": str(pool.threads), "TOKENIZERS_PARALLELISM": "false"}
        place: Any = "SPREAD" if pool.placement is Placement.spread else "DEFAULT"
        if pool.group is not None:
            place = PlacementGroupSchedulingStrategy(pool.group, placement_group_bundle_index=self.bundle)
        options = {"scheduling_strategy": place, "runtime_env": {"env_vars": variables}, **pool.resources}
        return ray.remote(Shell).options(**options).remote()

    def _serve(self) -> None:
        call: Call | None = None
        try:
            if not self.is_up:
                self._come_up()
            while True:
                call = self.pool.next_call(self)
                try:
                    if call is None:
                        self._look()
                    else:
                        self._do(call)
                except Fault as fault:
                    lost, call = call, None  # from here on it is the pool's
                    self._lost(lost, fault)
        except Closed:
            error: LlmscaleError = WorkerLostError("its pool was closed", where=self.where)
        except Exception as own:  # the driver's: a disk that is full, say
            error = own if isinstance(own, LlmscaleError) else WorkerError(repr(own), where=self.where)
            with suppress(Closed):
                self.pool.fail(error)
        if call is not None and not call.done():  # somebody may wait for it
            call.set_exception(error)

    def _do(self, call: Call) -> None:
        """Raises: Fault when the worker was lost over it."""
        if not call.running() and not call.set_running_or_notify_cancel():
            return
        with self._at(call.method):
            try:
                ended, result = self.actor.call.options(num_returns=2).remote(call.method, call.refs)
                self._watch(ended)
                rest = call.rest and call.rest(*call.args, self._watch(result))
            except RayTaskError as error:
                self.raised = self.raised or (time.monotonic(), f"{self.where}: {error}")
                lost = [arg.newest for arg in call.args if isinstance(arg, Call)]
                if lost and isinstance(error.cause, ObjectLostError):  # what another worker had made of it
                    for arg in lost:
                        arg.make_again()
                        arg.newest.exception()
                    self.pool.put_back(call)
                else:
                    call.set_exception(self.explained(error))
                    if self.pool.is_install(call):
                        self.refused = self.explained(error)
            except (Fault, Closed):
                raise
            except Exception as error:  # what cannot be sent, for one: whoever waits for the call has to hear of it
                call.set_exception(error)
            else:
                if self.pool.is_install(call):
                    self.refused = None
                if rest is None:
                    call.set_result(result)
                elif self.refused is not None:  # broken off for state that it has not taken up: without end, else
                    call.set_exception(self.refused)
                else:
                    call.args = [rest]
                    self.pool.put_back(call)

    @contextmanager
    def _at(self, method: str) -> Iterator[None]:
        self.method, self.since_s = method, time.monotonic()
        try:
            with phases.phase(f"{self.where} {method}"):
                yield
        finally:
            self.method, self.inside = "", ""

    def _watch(self, ref: ray.ObjectRef, limit_s: float | None = None) -> Any:
        """Wait for what it holds as long as the worker lives, or for `limit_s` where it is only coming up.

        Raises: Fault; RayTaskError, what the role raised; Closed.
        """
        started = time.monotonic()
        while not ray.wait([ref], timeout=TICK_S)[0]:
            if self.pool.closed:
                raise Closed
            if limit_s is None:
                self._look(ref)
            elif time.monotonic() - started > limit_s:
                raise Fault(LATE, f"did not come up in {limit_s:.0f} s (cluster.start_timeout_s)")
        try:
            return ray.get(ref)
        except RayTaskError:
            raise
        except RayError as error:
            if self.pool.closed:
                raise Closed from error
            lost = isinstance(error, RayActorError)
            what = "this worker died" if lost else f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            raise Fault(self._cause(error), what) from error

    def _look(self, ref: ray.ObjectRef | None = None) -> None:
        """Raises: Fault unless the worker answers, or `ref` is there."""
        limit_s = self.pool.answer_timeout_s
        if limit_s is None:
            return
        try:
            sign = ask(self.arrival.pulse, limit_s)
            self.moved_s, self.inside = time.monotonic() - sign.idle_s, sign.doing
        except ConnectionError as error:  # Ray is about to say so
            if ref is None or not ray.wait([ref], timeout=DEATH_IS_KNOWN_S)[0]:
                raise Fault(self._cause(), "this worker died") from error
        except OSError as error:
            if ref is None or not ray.wait([ref], timeout=0)[0]:
                what = f"has not answered for {limit_s:.0f} s (cluster.answer_timeout_s)"
                raise Fault(HUNG, what) from error

    def _cause(self, error: RayError | None = None) -> str:
        if isinstance(error, ActorDiedError) and "node" in str(error).partition("\n")[0].lower():
            return NODE_LOST
        node = next((n for n in ray.nodes() if n["NodeID"] == self.arrival.node), None)
        return DIED if node is not None and node["Alive"] else NODE_LOST

    def _lost(self, call: Call | None, fault: Fault) -> None:
        """Raises: Closed, when the pool cannot go on without this worker."""
        if self.pool.closed:
            raise Closed
        self.pool.lost(self, call, fault)
        self._come_up(fault)

    def _come_up(self, fault: Fault | None = None) -> None:
        """As one more, or after a fault in the place of another. Raises: Closed."""
        since_s = time.monotonic()
        while True:
            try:
                with self._at(COMING_UP):
                    self._begin()
                break
            except Fault as again:
                self.pool.lost(self, None, fault := again)
            except RayTaskError as error:  # the role cannot be built: no fault of the machines
                self.pool.fail(self.explained(error))
        self.pool.came(self, fault.cause if fault is not None else None, round(time.monotonic() - since_s, 2))

    def _begin(self) -> None:
        """Raises: Fault, RayTaskError, Closed."""
        pool = self.pool
        self.kill()
        self.actor = self._new_actor()
        arriving = self.actor.arrive.remote()
        while True:
            try:
                self.arrival = self._watch(arriving, pool.start_timeout_s)
                break
            except Fault as fault:
                if fault.cause != LATE or pool.is_short:
                    raise
        local_rank, local_size = pool.place_of(self)
        # Nobody meets at this port: the workers of a pool that heals know nothing of each other.
        self._watch(self.build(pool.num_workers, local_rank, local_size, self.arrival.pulse), pool.start_timeout_s)
        if (installed := pool.join(self)) is not None:
            ended, _ = self.actor.call.options(num_returns=2).remote(*installed)
            self._watch(ended)
