"""The process group: joining it, and the few collectives that engines need. In one process every collective is a no-op,
so that callers need no second path."""

from __future__ import annotations

import atexit
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llmscale.errors import WorkerLostError
from llmscale.phases import phase

LOOPBACK = "127.0.0.1"
ANYWHERE = "192.0.2.1"  # reserved for documentation (RFC 5737): reached by the default route, by nothing else
SIOCGIFADDR = 0x8915  # Linux, netdevice(7)
LOST_CONTACT = "lost contact with the other ranks"
OF_GLOO = ("gloo", "pair closure", "monitoredBarrier")  # what its errors say, which have no class of their own


@dataclass(frozen=True)
class World:
    """This process's place among the ranks of its pool."""

    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def device() -> torch.device:
    """The device of this process: its own CUDA device where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def world_from_environment() -> World:
    """RANK, WORLD_SIZE and LOCAL_RANK as torchrun or our own pools set them; where they are absent, srun's. A batch script's
    own shell is no task of a step and has no SLURM_STEP_NUM_TASKS: there this is one process."""
    env = os.environ
    if "RANK" not in env and "SLURM_STEP_NUM_TASKS" in env:
        return World(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
    return World(int(env.get("RANK", "0")), int(env.get("WORLD_SIZE", "1")), int(env.get("LOCAL_RANK", "0")))


def join(timeout_s: float) -> World:
    """Join the process group that the environment describes; one process alone needs none."""
    world = world_from_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    if "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface(world)):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    if world.size > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=timeout_s)
        store = _loopback_store(world, timeout)  # None: as MASTER_ADDR and torchrun say
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        if backend == "gloo":
            destroy_at_exit(None)
    return world


def destroy_at_exit(group: dist.ProcessGroup | None) -> None:
    """For gloo's groups: one rank in ten ended by SIGABRT where the interpreter's end found their threads alive (torch
    2.13). NCCL has no such threads, and destroying its groups could wait for a rank that has died."""
    atexit.register(dist.destroy_process_group, group)


@contextmanager
def limited_groups() -> Iterator[None]:
    """Groups that a library makes in this block get the time limit of the first one, not torch's own of half an hour, in
    which a host that has lost its power would not be missed."""
    c10d = dist.distributed_c10d
    before = set(c10d._world.pg_map)
    yield
    limit = c10d._get_default_group()._get_backend(device()).options._timeout
    for group in c10d._world.pg_map.keys() - before:
        c10d._set_pg_timeout(limit, group)


def _interface(world: World) -> str | None:
    """The network interface on which the other ranks reach this one; None: gloo chooses. It would take the address of the
    host's own name, which Debian writes as 127.0.1.1, where ranks on other hosts cannot follow."""
    master = os.environ.get("MASTER_ADDR", LOOPBACK)
    if world.size == 1 or master == LOOPBACK or os.environ.get("LOCAL_WORLD_SIZE") == str(world.size):
        return _interface_of(LOOPBACK)
    for there in (master, ANYWHERE):  # the host of rank 0 may know the master by a loopback address too
        own = address_towards(there)
        if own is not None and not own.startswith("127."):
            return _interface_of(own)
    return None


def address_towards(there: str) -> str | None:
    """This host's own IPv4 address on the way to another host; None when there is no way. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((there, 9))
        except OSError:
            return None
        return probe.getsockname()[0]


def _interface_of(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:  # struct ifreq: a name of 16 bytes, then struct sockaddr_in
                reply = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("40s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def _loopback_store(world: World, timeout: timedelta) -> dist.Store | None:
    """The rendezvous of ranks that are all on this machine. torch's own listens on every address, without a password."""
    address, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "0"))
    if address != LOOPBACK or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    if not world.is_main:
        return dist.TCPStore(address, port, world.size, False, timeout)
    listening = socket.create_server((address, port))
    return dist.TCPStore(address, port, world.size, True, timeout, master_listen_fd=listening.detach())


def free_bytes() -> int:
    """Of the memory of this process's device; 0 where that is the CPU, whose memory nobody hands over."""
    return torch.cuda.mem_get_info(device())[0] if torch.cuda.is_available() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        with phase("barrier"):
            dist.barrier()


def new_barrier(timeout_s: float) -> Callable[[], None]:
    """Collective: a barrier of its own group, on the CPU. Another thread may wait in it while this one takes part in the
    collectives of the others; two threads in one group would answer each other's calls.

    The barrier raises RuntimeError, naming the first rank that is missing, when that has not come after `timeout_s`.
    """
    if world_size() == 1:
        return lambda: None
    timeout = timedelta(seconds=timeout_s)
    group = dist.new_group(backend="gloo", timeout=timeout)
    destroy_at_exit(group)
    return lambda: dist.monitored_barrier(group, timeout)


def all_reduce(values: Mapping[str, float], op: str = "sum") -> dict[str, float]:
    """Sum or maximum over ranks of named numbers (float64); every rank gives the same names in any order."""
    if world_size() == 1:
        return dict(values)
    names = sorted(values)
    packed = torch.tensor([values[n] for n in names], dtype=torch.float64, device=device())
    with phase("all_reduce", names):
        dist.all_reduce(packed, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
        return dict(zip(names, packed.tolist(), strict=True))


def gather(items: Sequence[object]) -> list[object]:
    """The lists of all ranks joined in rank order, on every rank."""
    if world_size() == 1:
        return list(items)
    parts: list[list[object]] = [[] for _ in range(world_size())]
    with phase("gather"):
        dist.all_gather_object(parts, list(items))
    return [item for part in parts for item in part]


@contextmanager
def explaining_losses(role: str) -> Iterator[None]:
    """Raises: WorkerLostError in place of what torch says when another rank died, or did not come to a collective in time."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(word in str(error) for word in OF_GLOO)):
            raise
        what = f"{LOST_CONTACT}: {str(error).strip().splitlines()[0]}"
        fix = "The log of the rank that ended first says why; the same command resumes."
        raise WorkerLostError(what, where=f"{role} {rank()}", fix=fix) from error
