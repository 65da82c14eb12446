"""From the policy to the rollout workers: versioned weights, a bucket at a time, by the transport that the config chooses."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from llmscale.checkpoint.durable import atomic_write_text
from llmscale.cluster.broadcast import SEE_LOGS, Meetings
from llmscale.cluster.config import ClusterConfig, Transport
from llmscale.cluster.pool import Event, Pending, WorkerPool
from llmscale.cluster.transports import new_carrier
from llmscale.disk import patiently
from llmscale.errors import WorkerLostError

BUCKET_BYTES = 256 << 20  # of gathered weights held at once


class VersionCounter:
    """Versions that never repeat, over restarts either: the highest one is on disk before it is used."""

    def __init__(self, path: Path, waited: Callable[[float], None] = lambda seconds: None):
        """`waited` is told of seconds in which the disk was full."""
        self.path, self.waited = path, waited
        self.value = int(path.read_text()) if path.exists() else 0

    def next(self) -> int:
        self.value += 1
        patiently(lambda: atomic_write_text(self.path, f"{self.value}\n"), self.path.parent, self.waited)
        return self.value


class Publisher:
    """The driver's part: it numbers the versions and sees that each is held by every rollout worker, by one call to each."""

    def __init__(self, cluster: ClusterConfig, run_dir: Path, event: Event = lambda kind, **details: None):
        """`event` is told of weights that had to be fetched again, and of waits for space on the disk."""
        self.run_dir, self.event = run_dir, event
        self.versions = VersionCounter(run_dir / "weight_version", self._waited)
        self.carrier = new_carrier(cluster, run_dir)
        self.meetings = Meetings(cluster) if cluster.carried_by is Transport.broadcast else None
        self.loading: deque[tuple[int, Pending]] = deque()  # versions that workers have not been seen to take yet

    def publish(
        self,
        policy: WorkerPool,
        send: Callable[..., Any],
        rollout: WorkerPool,
        load: Callable[..., Any],
        sent: Callable[[], None] = lambda: None,
        interrupt: Callable[..., Any] | None = None,
    ) -> int:
        """Returns the version, which the workers have been given: each takes it when it is done with what it is about, and one
        that is to take another's place takes it first. `interrupt(version)`, a method of theirs, makes them break that off.

        `send(version, meeting)` and `load(version, parcel)` are the methods of the workers, as in
        `llmscale.cluster.transports.Carrier` and `llmscale.cluster.intake.Intake`; `sent` is called between them, unless they
        run at the same time.

        Raises: WorkerLostError naming who is gone or too slow, where both ends are at work at the same time.
        """
        version = self.versions.next()
        announce = (lambda: rollout.aside(interrupt, version)) if interrupt is not None else (lambda: None)
        if self.meetings is not None:
            with self.meetings.meeting(version, policy.members, rollout.members) as meeting:
                calls = policy.call(send, version, meeting), rollout.call(load, version, meeting)
                announce()
                self._wait(version, rollout.num_workers, *calls)
        else:
            parcel = patiently(lambda: policy.call(send, version, None).wait()[0], self.run_dir, self._waited)
            sent()
            self.loading.append((version, rollout.install(load, version, parcel)))
            announce()  # now, that they find the new weights before they go on
        return version

    def wait(self, at_most: int = 0) -> None:
        """Until no more than so many versions are on their way.

        Raises: DamagedWeightsError when what arrived is not what was sent, time and again.
        """
        while len(self.loading) > at_most:
            version, loaded = self.loading.popleft()
            for rank, times in enumerate(loaded.wait()):
                if times:
                    self.event("weights_damaged", where=f"rollout {rank}", version=version, fetched_again=times)
            self.carrier.clear(version)

    def close(self) -> None:
        """Nobody takes weights any more."""
        self.wait()
        self.carrier.clear(self.versions.value + 1)

    def _waited(self, seconds: float) -> None:
        self.event("disk_full", at="publish", seconds=seconds)

    def _wait(self, version: int, num_receivers: int, *calls: Pending) -> None:
        """For calls that wait for each other: the first failure of any, or of those that follow from it the one that knows
        most."""
        from llmscale.cluster.ray_calls import DEATH_IS_KNOWN_S

        errors: SimpleQueue[Exception | None] = SimpleQueue()
        for call in calls:
            threading.Thread(target=_report, args=(call, errors), daemon=True).start()
        lost: WorkerLostError | None = None
        for _ in calls:
            try:
                error = errors.get(timeout=2 * DEATH_IS_KNOWN_S if lost else None)
            except Empty:
                break
            if (
                type(error) is WorkerLostError and error.cause == WorkerLostError.cause
            ):  # it knows that somebody is gone, not who
                lost = lost or error
            elif error is not None:
                raise error
        if lost is not None:
            assert self.meetings is not None
            behind = ", ".join(f"rollout {place}" for place in self.meetings.behind(version, num_receivers))
            what = f"did not take weights {version} to the end within cluster.collective_timeout_s: {lost.what}"
            raise WorkerLostError(what, where=behind, fix=SEE_LOGS) from lost


def _report(call: Pending, errors: SimpleQueue[Exception | None]) -> None:
    try:
        call.wait()
    except Exception as error:  # the waiting thread's to judge
        errors.put(error)
    else:
        errors.put(None)
