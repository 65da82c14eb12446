"""The process group: joining it, and the few collectives that engines need. In one process every collective is a no-op,
so that callers need no second path."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from llmscale.errors import WorkerLostError
from llmscale.phases import phase


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
    if world.size > 1 and not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=timeout_s)
        store = _loopback_store(world, timeout)  # None: as MASTER_ADDR and torchrun say
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return world


def _loopback_store(world: World, timeout: timedelta) -> dist.Store | None:
    """The rendezvous of ranks that are all on this machine. torch's own listens on every address, without a password."""
    address, port = os.environ.get("MASTER_ADDR"), int(os.environ.get("MASTER_PORT", "0"))
    if address != "127.0.0.1" or "TORCHELASTIC_RUN_ID" in os.environ:
        return None
    if not world.is_main:
        return dist.TCPStore(address, port, world.size, False, timeout)
    listening = socket.create_server((address, port))
    return dist.TCPStore(address, port, world.size, True, timeout, master_listen_fd=listening.detach())


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
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        what = f"lost contact with the other ranks: {str(error).strip().splitlines()[0]}"
        fix = "The log of the rank that ended first says why; the same command resumes."
        raise WorkerLostError(what, where=f"{role} {rank()}", fix=fix) from error
