"""One of two gloo ranks that train and save at the same time: `python -m tests.checkpoint.ranks FOLDER`. Prints as JSON what
came of each scenario."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llmscale import distributed
from llmscale.checkpoint.background import AsyncSaver
from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.manifest import verify
from llmscale.errors import LlmscaleError

NUM_SAVES, STEPS_PER_SAVE = 4, 150
EARLY, LATE = ([save * STEPS_PER_SAVE + step for save in range(NUM_SAVES)] for step in (10, 120))


def train(step: int) -> None:
    """A collective whose result says which call of the other rank it met."""
    rank = distributed.rank()
    met = distributed.all_reduce({"sum": 10.0**rank * step, "max": 0.0})["sum"]
    assert met == 11.0 * step, f"rank {rank} met {met} at step {step}"
    if step % 7 == 0:
        assert distributed.gather([(rank, step)]) == [(0, step), (1, step)]
    if step % 5 == 0:
        distributed.barrier()


def both(directory: Path) -> Any:
    """Many short collectives while the thread that saves passes its barriers. One rank writes early and waits for the
    other, which writes late; they take turns."""
    rank = distributed.rank()
    reached = {step: threading.Event() for step in (*EARLY, *LATE)}

    def write(part: Path) -> None:
        turn = int(part.parent.name.rpartition("-")[2]) // STEPS_PER_SAVE
        assert reached[(EARLY if (rank + turn) % 2 else LATE)[turn]].wait(60)
        (part / f"rank{rank}").write_text("x")

    store = CheckpointStore(directory, keep=NUM_SAVES)
    with AsyncSaver(store, rank=rank, world_size=2, barrier=distributed.new_barrier(60)) as saver:
        for step in range(NUM_SAVES * STEPS_PER_SAVE):
            if step % STEPS_PER_SAVE == 0:
                saver.save(step, lambda: write)
            train(step)
            if step in reached:
                reached[step].set()
    for checkpoint in store.checkpoints():
        verify(checkpoint)
    return [c.step for c in store.checkpoints()]


def failing(directory: Path) -> Any:
    """The disk of rank 1 is full for one save; both hear of it at the next, and go on."""
    rank, told = distributed.rank(), ""

    def write(part: Path) -> None:
        if rank == 1 and not told:
            raise OSError(28, "No space left on device")
        (part / f"rank{rank}").write_text("x")

    saver = AsyncSaver(CheckpointStore(directory), rank=rank, world_size=2, barrier=distributed.new_barrier(60))
    saver.save(10, lambda: write)
    for step in range(1, 50):
        train(step)
    try:
        saver.save(20, lambda: write)
    except LlmscaleError as error:
        told = error.what
    saver.save(30, lambda: write)
    for step in range(50, 60):
        train(step)
    saver.wait()
    return {"told": told, "steps": [c.step for c in CheckpointStore(directory).checkpoints()]}


def absent(directory: Path) -> Any:
    """Rank 1 never comes to the barrier: it has a time limit of its own, far below that of the collectives."""
    barrier, error = distributed.new_barrier(1.0), ""
    if distributed.rank() == 0:
        started = time.monotonic()
        try:
            barrier()
        except RuntimeError as caught:
            error = str(caught)
        assert time.monotonic() - started < 50
    distributed.barrier()
    return error


def main(folder: Path) -> None:
    distributed.join(timeout_s=120)
    print(json.dumps({scenario.__name__: scenario(folder / scenario.__name__) for scenario in (both, failing, absent)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
