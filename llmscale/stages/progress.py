"""When nothing moves any more in a run over pools: who waits for whom, and for how long; then the end of it.

A worker that dies or is stopped is the pools' own matter. This is for all else: a reward that waits for a service that never
answers, ranks that wait for each other, a disk that does not come back. Each process counts the phases that end in it
(`llmscale/phases.py`); workers tell when they are asked whether they live.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping

from llmscale import phases
from llmscale.cluster.pool import Doing, WorkerPool
from llmscale.training.watchdog import end_process, watch_idleness

SHOWN = 20  # workers in the message


class ProgressWatch:
    """While the context is open: when no phase has ended anywhere for `timeout_s`, `report` is told what everybody is doing;
    after twice that time this process ends, and its workers with it."""

    def __init__(self, pools: Mapping[str, WorkerPool], timeout_s: float, report: Callable[[str], None]):
        self._pools, self._timeout_s, self._report = pools, timeout_s, report
        self._told = False
        self._closed = threading.Event()

    def __enter__(self) -> None:
        arguments = (self._closed, self._last_move_s, min(self._timeout_s / 10, 10.0), self._look)
        threading.Thread(target=watch_idleness, args=arguments, name="progress", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _last_move_s(self) -> float:
        return max([phases.last_end_s(), *(doing.moved_s for doing in self._workers())])

    def _workers(self) -> Iterator[Doing]:
        for pool in self._pools.values():
            yield from pool.doing()

    def _look(self, idle_s: float) -> None:
        if idle_s < self._timeout_s:
            self._told = False
        elif idle_s > 2 * self._timeout_s:
            end_process(lambda: self._say(f"{self._stalled(idle_s)}; this run ends"))
        elif not self._told:
            self._told = True  # in a thread of its own, for it may be a disk that does not answer
            threading.Thread(target=self._say, args=(self._stalled(idle_s),), daemon=True).start()

    def _stalled(self, idle_s: float) -> str:
        return f"nothing has moved for {idle_s:.0f} s (cluster.progress_timeout_s)"

    def _say(self, what: str) -> None:
        workers = list(self._workers())
        raised = [doing.raised for doing in workers if doing.raised is not None]
        first = [f"The first that a worker raised:\n{min(raised)[1]}"] if raised else []
        now = time.monotonic()
        busy = [
            f"{doing.where} (pid {doing.pid}) is at {doing.method}, for {now - doing.since_s:.0f} s"
            + (f": {doing.inside}" if doing.inside else "")
            for doing in sorted(workers, key=lambda doing: doing.since_s)
            if doing.method
        ]
        queued = [f"{n} calls wait for {role}" for role, pool in self._pools.items() if (n := pool.num_waiting())]
        text = "; ".join([what, f"the driver is in {phases.describe_main() or 'no phase'}", *busy[:SHOWN], *queued])
        self._report("\n".join([*first, text]))
