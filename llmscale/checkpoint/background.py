"""Saving while training goes on: the engine makes a copy, a thread writes and commits it.

    with AsyncSaver(store, rank=..., world_size=..., barrier=new_barrier(timeout_s)) as saver:
        saver.save(step, engine.snapshot)

At most one save is in flight: the next one, `wait` and the end of the block wait for it. A program that ends without
any of these waits too. Until the thread has renamed its directory, the checkpoint before is the newest.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.task import Task


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is on disk."""

    step: int
    path: Path
    seconds: float  # from the copy to the commit


class AsyncSaver:
    """Commits to `store` in the background. `barrier` is passed by that thread while this one trains: it must be of a
    process group of its own (`llmscale.distributed.new_barrier`)."""

    def __init__(
        self,
        store: CheckpointStore,
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ):
        self.store, self.rank, self.world_size, self.barrier = store, rank, world_size, barrier
        self._task: Task[Saved] | None = None
        atexit.register(self._tell)

    def save(
        self,
        step: int,
        snapshot: Callable[[], Callable[[Path], Mapping[str, str] | None]],
        *,
        score: float | None = None,
    ) -> Saved | None:
        """Collective: let `snapshot` copy the state and begin to write the copy. It is called when the save before has
        ended, so that there is one copy in memory. Returns and raises what `wait` does.
        """
        before = self.wait()
        write = snapshot()
        started = time.perf_counter()

        def commit() -> Saved:
            place = {"rank": self.rank, "world_size": self.world_size}
            path = self.store.save(step, write, score=score, barrier=self.barrier, **place)
            return Saved(step, path, time.perf_counter() - started)

        self._task = Task(commit)
        return before

    def wait(self) -> Saved | None:
        """Wait for the save in flight; returns what came of it, None when there was none.

        Raises: whatever it raised, once.
        """
        if self._task is None:
            return None
        self._task.wait()
        task, self._task = self._task, None  # only now: an interrupt while it waited must not lose the outcome
        return task.result()

    def settled(self, timeout_s: float) -> bool:
        """Whether no save is in flight any more, by then."""
        return self._task is None or self._task.wait(timeout_s)

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        else:
            self._tell()  # what ended the block is the error to raise, but the save's is not lost

    def _tell(self) -> None:
        try:
            self.wait()
        except Exception as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
