"""The process of one Ray worker: what it sets up before its role is built, and how the role's methods are called."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from llmscale.cluster.pulse import Address, Pulse
from llmscale.errors import ClusterError


@dataclass(frozen=True)
class Arrival:
    """Where a worker's process is."""

    node: str  # Ray's id of its node
    address: str  # of the node
    pid: int
    pulse: Address
    word: str  # which opens it to more than questions


@dataclass(frozen=True)
class Place:
    """A worker's place in its pool."""

    role: str
    rank: int
    size: int
    local_rank: int  # among the pool's workers on its node
    local_size: int
    master: Address  # of rank 0


class Shell:
    """The process of one worker."""

    role: Any = None

    def arrive(self) -> Arrival:
        address = ray.util.get_node_ip_address()
        self.pulse = Pulse(address, self.aside)
        node = ray.get_runtime_context().get_node_id()
        return Arrival(node, address, os.getpid(), self.pulse.address, self.pulse.word)

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind((ray.util.get_node_ip_address(), 0))
            return probe.getsockname()[1]

    def build(self, role: Callable[[], Any], place: Place, threads: int, directory: str, log_file: str) -> None:
        """Set this process up as torch.distributed and DeepSpeed read it from the environment, then make the role."""
        node = ray.util.get_node_ip_address()
        if not Path(directory).is_dir():
            fix = "Every host needs the driver's working directory, for relative paths mean it."
            raise ClusterError(f"{directory} does not exist on {node}", where="cluster", fix=fix)
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
        with suppress(OSError):  # a disk that is full costs this line, not the worker
            print(
                f"rank {place.rank} of {place.size} on {socket.gethostname()} ({node}), pid {os.getpid()}",
                flush=True,
            )
        import torch

        from llmscale.distributed import explaining_losses

        torch.set_num_threads(threads)
        self.place, self.explaining_losses = place, explaining_losses
        with explaining_losses(place.role):
            self.role = role()

    def aside(self, method: str, *args: Any) -> None:
        """While the role may be at something else, in another thread. One that is not there yet misses it."""
        if self.role is not None:
            getattr(self.role, method)(*args)

    def call(self, method: str, args: Sequence[Any]) -> tuple[None, Any]:
        """What the method returns, behind an empty result: whoever waits for its end, or why there is none, need not fetch
        what it made."""
        with self.explaining_losses(self.place.role):
            return None, getattr(self.role, method)(*(ray.get(a) if isinstance(a, ray.ObjectRef) else a for a in args))


def _redirect_output(log_file: Path) -> None:
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
