"""Where workers run and what each of them gets."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from enum import Enum

from llmscale.config import Problem, at_least, option

RLHF_ROLES = ("policy", "critic", "reference", "reward", "rollout")

COLOCATABLE = ("policy", "critic", "reference", "rollout")

OF_WORKERS = ("kill", "stop", "delay", "cut")  # faults that hit the worker of a role


class Backend(Enum):
    local = "local"  # everything in this process: for debugging, and for one small device
    ray = "ray"  # one Ray actor per worker, each role in its own pool


class Placement(Enum):
    pack = "PACK"  # workers of a pool on as few nodes as possible
    spread = "SPREAD"  # on as many as possible


class Transport(Enum):
    """How new weights get from the policy to the rollout workers."""

    auto = "auto"  # broadcast where both have whole GPUs of their own, else direct in one process, object_store in Ray
    direct = "direct"  # by hand, in one process
    object_store = "object_store"  # Ray's shared memory: once a host
    file = "file"  # files in the run directory, which every host sees
    broadcast = "broadcast"  # from the policy to all workers at the same time: NCCL between whole GPUs, else gloo
    cuda_ipc = "cuda_ipc"  # refused, see problems


@dataclass
class PoolConfig:
    """One role's workers and the resources of each."""

    num_workers: int = 1
    num_cpus: float = 1.0  # per worker; a share of a core is fine
    num_gpus: float = 0.0  # per worker
    resources: dict[str, float] = field(default_factory=dict)  # custom Ray resources per worker
    placement: Placement = Placement.pack

    @property
    def fewest(self) -> int:
        """Workers that it cannot do without."""
        return self.num_workers

    @property
    def most(self) -> int:
        return self.num_workers

    @property
    def is_elastic(self) -> bool:
        """Whether workers may come later than the pool and go earlier."""
        return self.fewest < self.most

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, num_workers=1, num_cpus=0, num_gpus=0)


@dataclass
class RolloutPoolConfig(PoolConfig):
    """On Ray it begins with `min_workers`, takes more as places are found, and goes on with fewer when hosts go."""

    # None, for both: num_workers. Where fewer than min_workers are left, a lost one is waited for
    min_workers: int | None = None
    max_workers: int | None = None  # those without a place wait in Ray, where an autoscaler sees them

    @property
    def fewest(self) -> int:
        return self.num_workers if self.min_workers is None else self.min_workers

    @property
    def most(self) -> int:
        return self.num_workers if self.max_workers is None else self.max_workers

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, min_workers=1, max_workers=1)
        if self.fewest > self.most:
            what = f"at least {self.fewest} workers and at most {self.most}"
            yield "max_workers", what, "Raise it, or lower min_workers; one that is left out is num_workers."


@option("chaos", "faults", builds="llmscale.cluster.chaos:Chaos")
@dataclass
class ChaosConfig:
    """Faults that a run over Ray is given on purpose, to see that it goes on. Which and when is a function of the seed."""

    name: str = "faults"
    seed: int = 0
    every_s: float = 60.0  # between two faults, on average
    kill: list[str] = field(default_factory=list)  # roles one of whose workers is killed
    stop: list[str] = field(default_factory=list)  # or stopped for good, as if it hung
    delay: list[str] = field(default_factory=list)  # or stopped for a while
    cut: list[str] = field(default_factory=list)  # or whose host is cut off from all others for a while
    corrupt: bool = (
        False  # one bit of the next weights is flipped in a rollout worker's memory, before it takes them up
    )
    fill: bool = False  # the disk of the run directory is full for a while
    delay_s: float = 5.0  # how long "a while" is; of a cut it may be for good

    def of(self, roles: Collection[str]) -> list[tuple[str, str]]:
        """(action, role) of all that may happen to a run with these roles."""
        hit = [(action, role) for action in OF_WORKERS for role in getattr(self, action) if role in roles]
        corrupt = [("corrupt", "rollout")] if self.corrupt and "rollout" in roles else []
        return [*hit, *corrupt, *([("fill", "")] if self.fill else [])]

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, seed=0, delay_s=0)
        if self.every_s <= 0:
            yield "every_s", f"must be above 0, is {self.every_s}", "60 is one fault a minute."
        for action in OF_WORKERS:
            for role in getattr(self, action):
                if role not in RLHF_ROLES:
                    yield action, f"there is no role {role!r}", f"Choose among {', '.join(RLHF_ROLES)}."


@dataclass
class ClusterConfig:
    """Supervised stages use the pool `trainer`; RLHF uses the other five; collect and rollout use reward and rollout."""

    backend: Backend = Backend.local
    address: str | None = None  # of a running Ray cluster; None: one is started on this machine
    # RLHF roles whose worker i have one place and one device, whose memory is the rollouts' or the others', by turns: rollout
    # and some of policy, critic, reference. The others are placed separately
    colocated: list[str] = field(default_factory=list)
    transport: Transport = Transport.auto  # of new weights to the rollout workers
    threads_per_worker: int = 1  # CPU threads of torch in each worker
    start_timeout_s: float = 120.0  # longest wait for a pool to come up
    collective_timeout_s: float = 300.0  # longest wait inside one collective before its ranks give up
    # A rank of a supervised stage in which nothing has ended for so long ends itself, and says what it was doing; below
    # collective_timeout_s, which says less
    stall_timeout_s: float = 240.0
    # How often in an hour, for the same cause (died, hung, its node lost), a worker that is alone in what it does is replaced,
    # and a pool of ranks that train together is started again from the last checkpoint; beyond it the run stops
    max_restarts: int = 5
    answer_timeout_s: float = 20.0  # a worker of RLHF, collect or rollout that does not answer for so long has hung
    # Where nothing has moved for so long in RLHF, neither in the driver nor in a worker, it says who waits for whom; after
    # twice that time it ends. Longer than the longest unit of work
    progress_timeout_s: float = 900.0
    trainer: PoolConfig = field(default_factory=PoolConfig)
    policy: PoolConfig = field(default_factory=PoolConfig)
    critic: PoolConfig = field(default_factory=PoolConfig)
    reference: PoolConfig = field(default_factory=PoolConfig)
    reward: PoolConfig = field(default_factory=PoolConfig)
    rollout: RolloutPoolConfig = field(default_factory=RolloutPoolConfig)

    @property
    def one_process(self) -> bool:
        """Whether every worker runs in the driver's own process."""
        return self.backend is Backend.local and self.address is None

    @property
    def on_gpus(self) -> bool:
        """Whether policy and rollout workers have whole GPUs."""
        return self.policy.num_gpus >= 1 and self.rollout.num_gpus >= 1

    @property
    def carried_by(self) -> Transport:
        """The transport that is meant."""
        if self.transport is not Transport.auto:
            return self.transport
        if self.one_process:
            return Transport.direct
        together = self.on_gpus and not self.colocated and not self.rollout.is_elastic
        return Transport.broadcast if together else Transport.object_store

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, threads_per_worker=1, start_timeout_s=1, collective_timeout_s=1)
        yield from at_least(self, stall_timeout_s=1, max_restarts=0, answer_timeout_s=1, progress_timeout_s=1)
        if self.backend is Backend.local:
            for role in RLHF_ROLES:
                if getattr(self, role).most > 1:
                    what = "the local backend runs one worker of each role"
                    yield f"{role}.num_workers", what, "Add cluster=ray, or leave it at 1."
        if self.rollout.is_elastic and "rollout" in self.colocated:
            what = "there are as many colocated workers as those whose devices they share"
            yield "rollout.max_workers", what, "Leave out min_workers and max_workers, or colocated."
        yield from self._unfit_transport()
        yield from self._unfit_colocation()

    def _unfit_transport(self) -> Iterator[Problem]:
        if self.transport is Transport.cuda_ipc:
            what = "CUDA IPC needs policy and rollout weights on one device at a time, where colocated roles have it by turns"
            yield "transport", what, "Leave it out: colocated workers share host memory, by object_store or file."
        if self.transport is Transport.direct and not self.one_process:
            yield "transport", "direct is by hand, and here are several processes", "Leave it out."
        if self.transport in (Transport.object_store, Transport.broadcast) and self.one_process:
            yield "transport", f"{self.transport.value} is between processes, and here is one", "Add cluster=ray."
        if self.transport is Transport.broadcast and self.rollout.is_elastic:
            what = "a broadcast has a fixed group, and with min_workers or max_workers rollout workers come and go"
            yield "transport", what, "Leave it out: weights then wait in Ray's object store for whoever comes."
        if self.transport is Transport.broadcast and self.colocated:
            what = "both ends have to be awake, and colocated roles have the device by turns"
            yield "transport", what, "Leave it out."

    def _unfit_colocation(self) -> Iterator[Problem]:
        if not self.colocated:
            return
        unknown = [name for name in self.colocated if name not in COLOCATABLE]
        if unknown or "rollout" not in self.colocated or not 1 < len(self.colocated) == len(set(self.colocated)):
            what = f"[{', '.join(self.colocated)}] are not rollout and some of policy, critic and reference, each once"
            yield "colocated", what, "For example [policy,rollout]."
            return
        first, *others = self.colocated
        pool: PoolConfig = getattr(self, first)
        if pool.num_gpus not in (0, 1):
            yield f"{first}.num_gpus", f"colocated workers share one device, not {pool.num_gpus:g}", "Set it to 1 or 0."
        if self.rollout.fewest != self.rollout.num_workers or self.rollout.most != self.rollout.num_workers:
            what = "colocated workers are as many as those with whom they share their devices"
            yield "rollout.max_workers", what, "Leave min_workers and max_workers out."
        for name in others:
            for key in ("num_workers", "num_gpus", "placement"):
                if getattr(getattr(self, name), key) != getattr(pool, key):
                    yield f"{name}.{key}", f"{name} has the places of {first}, and another {key}", "Give both the same."
