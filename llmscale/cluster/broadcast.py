"""Weights broadcast from the policy's first rank to every rollout worker at the same time, by NCCL between GPUs, else by gloo.

The process groups of either side are left alone: sender and receivers form one of their own, rank 0 being the sender and rank
i + 1 rollout worker i. They find each other in a store that the driver holds (`Meetings`), which also carries what is said
about the tensors: of each bucket, before it is sent, names, types, shapes and digest; and how far each receiver has come, so
that one that does not answer can be named. The group lasts until the set of workers changes or a publication fails; the next
one makes another.

Arrived buckets wait in host memory until all are there, for none may be used before that, and digests are of bytes on the
host. So a worker holds the published weights once more while it receives them.
"""

from __future__ import annotations

import atexit
import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llmscale import distributed
from llmscale.cluster.config import ClusterConfig
from llmscale.cluster.transports import Buckets
from llmscale.errors import WorkerLostError
from llmscale.models.weights import bucket_of, fingerprint
from llmscale.protocols import WeightBucket

SEE_LOGS = "The log of the worker that ended first says why; the same command resumes."


@dataclass(frozen=True)
class Meeting:
    """Where one set of members meets: a store, and the name of their group in it."""

    host: str
    port: int
    group: str
    size: int  # the sender, rank 0, and every receiver


class Broadcast:
    """`llmscale.cluster.transports.Carrier`: one member of the group."""

    keeps = False

    def __init__(self, cluster: ClusterConfig):
        self.timeout = timedelta(seconds=cluster.collective_timeout_s)
        self.device = distributed.device() if cluster.on_gpus else torch.device("cpu")
        self.meeting: Meeting | None = None
        self.store: dist.Store
        self.group: Any = None
        if self.device.type == "cpu":
            atexit.register(self._leave)  # see distributed.destroy_at_exit

    def send(self, version: int, buckets: Buckets, dtype: torch.dtype, meeting: Any = None) -> None:
        if distributed.rank() != 0:
            return
        numbers = count()

        def say(**message: Any) -> None:
            self.store.set(_key(version, next(numbers)), json.dumps(message))

        with _explaining("policy 0", version):
            self._join(meeting, rank=0)
            try:
                for bucket in buckets:
                    weights = {n: v.detach().to(self.device, dtype).contiguous() for n, v in bucket.items()}
                    shapes = {name: list(value.shape) for name, value in weights.items()}
                    say(shapes=shapes, dtype=str(dtype).removeprefix("torch."), digest=fingerprint(weights))
                    self._spread(weights.values())
                    del bucket, weights  # else they would still be there while the next one is gathered
            except Exception as error:  # of whatever kind: nobody may wait for what does not come
                say(failed=str(error))
                raise
            say(last=True)

    def receive(self, version: int, parcel: Meeting) -> list[WeightBucket]:
        place = distributed.world_from_environment().rank
        arrived: list[WeightBucket] = []
        with _explaining(f"rollout {place}", version):
            self._join(parcel, rank=place + 1)
            while "last" not in (said := json.loads(self.store.get(_key(version, len(arrived))))):
                if "failed" in said:
                    raise WorkerLostError(f"did not send weights {version}: {said['failed']}", where="policy 0")
                dtype = getattr(torch, said["dtype"])
                weights = {n: torch.empty(s, dtype=dtype, device=self.device) for n, s in said["shapes"].items()}
                self._spread(weights.values())
                arrived.append(bucket_of({n: value.cpu() for n, value in weights.items()}, said["digest"]))
                self.store.set(_progress(place), f"{version} {len(arrived)}")
        return arrived

    def clear(self, version: int) -> None: ...

    def _spread(self, tensors: Iterable[Tensor]) -> None:
        """What the sender holds is afterwards held by all: bytes, of whatever type."""
        works = [self.group.broadcast(tensor.view(-1).view(torch.uint8), 0) for tensor in tensors]
        for work in works:
            work.wait()

    def _join(self, meeting: Meeting, rank: int) -> None:
        """Wait for all members. A group of another set of members is left."""
        if meeting == self.meeting:
            return
        self._leave()
        store = dist.TCPStore(meeting.host, meeting.port, None, False, self.timeout, wait_for_workers=False)
        self.store = dist.PrefixStore(meeting.group, store)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.timeout
            self.group = dist.ProcessGroupNCCL(self.store, rank, meeting.size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo  # more than its stubs say
            options = gloo._Options()
            options._timeout = self.timeout
            # The address by which the others reach this host, whatever interface its own process groups use.
            own = distributed.address_towards(meeting.host) or distributed.LOOPBACK
            options._devices = [gloo.create_device(hostname=own)]
            self.group = gloo(self.store, rank, meeting.size, options)
        self.meeting = meeting

    def _leave(self) -> None:
        self.group = self.meeting = None


class Meetings:
    """The driver's part: the store, and who meets in it."""

    def __init__(self, cluster: ClusterConfig):
        self.host = distributed.LOOPBACK
        if cluster.address is not None:
            import ray

            self.host = ray.util.get_node_ip_address()
        listening = socket.create_server((self.host, 0))  # the store would listen on every address
        self.port = listening.getsockname()[1]
        timeout = timedelta(seconds=cluster.collective_timeout_s)
        self.store = dist.TCPStore(
            self.host, self.port, None, True, timeout, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self.members: Sequence[str] | None = None  # of the last group, where that still holds
        self.groups = 0

    @contextmanager
    def meeting(self, version: int, senders: Sequence[str], receivers: Sequence[str]) -> Iterator[Meeting]:
        """Where the members of both pools meet for one publication, in the group of the last one where they are the same."""
        members = [*senders, *receivers]
        self.groups += members != self.members
        self.members = None
        yield Meeting(self.host, self.port, f"group-{self.groups}", 1 + len(receivers))
        store = self._store()
        for number in count():
            if not store.delete_key(_key(version, number)):
                break
        self.members = members

    def behind(self, version: int, num_receivers: int) -> list[int]:
        """The receivers that have taken fewest of the buckets."""
        store = self._store()
        taken = []
        for place in range(num_receivers):
            key = _progress(place)
            of, _, number = store.get(key).decode().partition(" ") if store.check([key]) else ("", "", "")
            taken.append(int(number) if of == str(version) else 0)
        return [place for place, number in enumerate(taken) if number == min(taken)]

    def _store(self) -> dist.Store:
        return dist.PrefixStore(f"group-{self.groups}", self.store)


def _key(version: int, number: int) -> str:
    return f"{version}/{number}"


def _progress(place: int) -> str:
    return f"taken/{place}"


@contextmanager
def _explaining(worker: str, version: int) -> Iterator[None]:
    """Raises: WorkerLostError in place of what torch says when another member is gone or does not come in time."""
    try:
        yield
    except RuntimeError as error:  # gloo's have no class of their own
        what = f"{distributed.LOST_CONTACT}, when weights {version} were sent: {str(error).strip().splitlines()[0]}"
        raise WorkerLostError(what, where=worker, fix=SEE_LOGS) from error
