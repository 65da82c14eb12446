"""Pools of Ray actors. An actor is a shell round a role: it sets up its process, builds the role and calls its methods.

Ray is started on loopback when no address is given; workers die with the driver.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from llmscale.cluster import placement
from llmscale.cluster.config import ClusterConfig, PoolConfig
from llmscale.cluster.placement import Group
from llmscale.cluster.reaper import Reaper
from llmscale.errors import ClusterError, LlmscaleError, WorkerError, WorkerLostError

LOOPBACK = "127.0.0.1"
KNOCK_S = 10.0
PATIENCE_S = 3.0  # before it is said for what a pool waits
HOW_TO_JOIN = (
    "Ray must be up there (ray status), this host a part of it (ray start), and RAY_AUTH_MODE and the token those that it "
    "was started with."
)
DIED = "this worker died"
DEATH_IS_KNOWN_S = 5.0
QUEUED = 2  # units of a stream that a worker has, so that it never waits for the driver
AHEAD = 8  # times the workers: units of a stream that are begun and not yet taken, so that a slow one stops nobody soon
reapers: list[Reaper] = []  # of the Ray that this process has started


@dataclass(frozen=True)
class Place:
    """A worker's place in its pool."""

    rank: int
    size: int
    local_rank: int  # among the pool's workers on its node
    local_size: int
    master: tuple[str, int]  # address and port of rank 0


class Shell:
    """The process of one worker."""

    def node(self) -> str:
        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind((self.node(), 0))
            return probe.getsockname()[1]

    def build(self, role: Callable[[], Any], place: Place, threads: int, directory: str, log_file: str) -> None:
        """Set this process up as torch.distributed and DeepSpeed read it from the environment, then make the role."""
        if not Path(directory).is_dir():
            fix = "Every host needs the driver's working directory, for relative paths mean it."
            raise ClusterError(f"{directory} does not exist on {self.node()}", where="cluster", fix=fix)
        os.chdir(directory)
        _redirect_output(Path(log_file))
        address, port = place.master
        # Ray shows a worker its own GPUs only, so that the first of them is always its own.
        local_rank = 0 if ray.get_gpu_ids() else place.local_rank
        os.environ |= {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.size),
            "LOCAL_RANK": str(local_rank),
            # DeepSpeed takes ranks for local, and speaks to them through shared memory, where this equals WORLD_SIZE.
            "LOCAL_SIZE": str(place.local_size),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        print(
            f"rank {place.rank} of {place.size} on {socket.gethostname()} ({self.node()}), pid {os.getpid()}",
            flush=True,
        )
        import torch

        torch.set_num_threads(threads)
        self.role = role()

    def call(self, method: str, args: Sequence[Any]) -> Any:
        return getattr(self.role, method)(*(ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in args))


def _redirect_output(log_file: Path) -> None:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())


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


@dataclass
class RayUnits:
    """Units go to workers as these become free; at most one is in flight on each, so a slow one delays only itself."""

    pool: RayPool
    method: str
    units: Sequence[Any]

    def __post_init__(self) -> None:
        self.results: list[Any] = [None] * len(self.units)
        self.waiting = list(range(len(self.units)))
        self.running: dict[ray.ObjectRef, tuple[int, int]] = {}
        for rank in range(self.pool.num_workers):
            self._start_next(rank)

    def wait(self) -> list[Any]:
        while self.running:
            (ready,), _ = ray.wait(list(self.running), num_returns=1)
            index, rank = self.running.pop(ready)
            self.results[index] = self.pool.get([ready], [rank])[0]
            self._start_next(rank)
        return self.results

    def _start_next(self, rank: int) -> None:
        if self.waiting:
            index = self.waiting.pop(0)
            self.running[self.pool.actors[rank].call.remote(self.method, (self.units[index],))] = (index, rank)


class RayPool:
    """`llmscale.cluster.pool.WorkerPool` of Ray actors in one placement group."""

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

    @property
    def members(self) -> list[str]:
        return [actor._actor_id.hex() for actor in self.actors]

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

    def units(self, method: Callable[..., Any], units: Sequence[Any]) -> RayUnits:
        return RayUnits(self, method.__name__, units)

    def stream(self, method: Callable[..., Any], units: Iterable[Any]) -> Iterator[Any]:
        """Results wait in Ray's object store, not here, until their turn."""
        waiting = enumerate(units)
        free = deque(list(range(self.num_workers)) * QUEUED)
        running: dict[ray.ObjectRef, tuple[int, int]] = {}  # -> index of the unit, rank
        done: dict[int, tuple[ray.ObjectRef, int]] = {}
        for turn in count():
            while turn not in done:
                room = min(len(free), AHEAD * self.num_workers - len(running) - len(done))
                for index, unit in islice(waiting, room):
                    rank = free.popleft()
                    running[self.actors[rank].call.remote(method.__name__, (unit,))] = (index, rank)
                if not running:
                    return
                (ready,), _ = ray.wait(list(running), num_returns=1)
                index, rank = running.pop(ready)
                done[index] = (ready, rank)
                free.append(rank)
            ref, rank = done.pop(turn)
            yield self.get([ref], [rank])[0]

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


def open_ray_pools(cluster: ClusterConfig, roles: Mapping[str, Callable[[], Any]], log_dir: str) -> dict[str, RayPool]:
    """Connect to Ray or start it here, reserve the places of every role, and build the roles."""
    configs: dict[str, PoolConfig] = {name: getattr(cluster, name) for name in roles}
    listed = ", ".join(f"{config.num_workers} {name}" for name, config in configs.items())
    print(f"starting Ray and its workers: {listed}", file=sys.stderr, flush=True)
    _connect(cluster, configs)
    groups = placement.groups(cluster, roles)
    placement.check(groups, [(n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"]])
    pools = {
        name: RayPool(name, group.share(name), cluster.threads_per_worker, place, log_dir)
        for group, place in zip(groups, _reserved(groups, cluster.start_timeout_s), strict=True)
        for name in group.pools
    }
    for together in placement.start_order(cluster, roles):
        building = [(pools[name], pools[name].start(roles[name], cluster.start_timeout_s)) for name in together]
        for pool, refs in building:
            pool.get(refs, list(range(pool.num_workers)), cluster.start_timeout_s)
    return {name: pools[name] for name in roles}


def _reserved(groups: Sequence[Group], timeout_s: float) -> list[PlacementGroup]:
    """Raises: ClusterError when somebody else holds what a group needs, and goes on to."""
    places = [placement_group([dict(g.place)] * g.size, strategy=g.any.placement.value) for g in groups]
    deadline = time.monotonic() + timeout_s
    for group, place in zip(groups, places, strict=True):
        if place.wait(PATIENCE_S):
            continue
        what = placement.lacking(group, ray.available_resources(), ray.cluster_resources())
        print(f"waiting for {group.where}: {what}", file=sys.stderr, flush=True)
        if not place.wait(max(0.0, deadline - time.monotonic())):
            fix = f"Nothing changed in {timeout_s:g} s (cluster.start_timeout_s). End what runs there, or lower what it needs."
            raise ClusterError(what, where=group.where, fix=fix)
    return places


def shut_down() -> None:
    """End Ray and every worker that this process started; safe to call when there is none."""
    if ray.is_initialized():
        ray.shutdown()
    while reapers:
        reapers.pop().close()


def _connect(cluster: ClusterConfig, configs: dict[str, PoolConfig]) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "ERROR"}
    if cluster.address is not None:
        try:
            _knock(cluster.address)
            with _own_signals():
                ray.init(address=cluster.address, **quiet)
        except (OSError, ValueError, RuntimeError, RayError) as error:
            what = f"cannot connect to Ray at {cluster.address}: {error}"
            raise ClusterError(what, where="cluster.address", fix=HOW_TO_JOIN) from error
        return
    # On one machine CPUs are shares that we hand out ourselves; GPUs are what is there.
    wanted = sum(c.num_workers * c.num_cpus for c in configs.values())
    with _own_signals():
        ray.init(
            address="local",  # whatever RAY_ADDRESS says
            num_cpus=max(os.cpu_count() or 1, int(-(-wanted // 1))),
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            **quiet,
        )
    node = ray._private.worker.global_worker.node
    assert node is not None
    reapers.append(Reaper(node.get_session_dir_path()))


@contextmanager
def _own_signals() -> Iterator[None]:
    """ray.init gives SIGTERM a handler of its own, which ends the driver with code 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # that handler, at work
        signal.signal(signal.SIGTERM, ours)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


def _knock(address: str) -> None:
    """Ray would try for minutes. Raises: OSError when nothing listens there."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:  # else `auto` or a form of Ray's own
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
