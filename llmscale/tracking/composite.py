"""The trackers of one run behind one interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmscale.errors import DamagedWeightsError, Requeue, WorkerLostError
from llmscale.tracking.config import TrackingConfig, WandbMode
from llmscale.tracking.console import ConsoleTracker
from llmscale.tracking.jsonl import JsonlTracker

if TYPE_CHECKING:  # the protocol's module imports torch
    from llmscale.protocols import Tracker


class CompositeTracker:
    """Passes everything on to each of `trackers`, in order."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        for tracker in self._trackers:
            tracker.samples(step, records)

    def event(self, kind: str, **details: Any) -> None:
        for tracker in self._trackers:
            tracker.event(kind, **details)

    def finish(self, status: str) -> None:
        """Each is finished even if another raises, the last first: it may still report to the ones before it."""
        with ExitStack() as stack:
            for tracker in self._trackers:
                stack.callback(tracker.finish, status)


class NullTracker:
    """What every process but the one that logs is given."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        pass

    def event(self, kind: str, **details: Any) -> None:
        pass

    def finish(self, status: str) -> None:
        pass


def open_trackers(
    config: TrackingConfig,
    *,
    run_dir: Path,
    run_id: str,
    title: str,
    total_steps: int,
    resume_step: int,
    run_config: Mapping[str, Any],
) -> Tracker:
    """The trackers of a run, for the one process of it that logs; the others take a `NullTracker`.

    `run_id` stays the same over all attempts of a run and is its own within the W&B project. `resume_step` is the
    step of the checkpoint that this attempt starts from, -1 for none. `run_config` has no secrets in it.

    Raises: RunError when the run directory cannot be written.
    """
    jsonl = JsonlTracker(run_dir, resume_step)
    console = ConsoleTracker(config.console_every_s, title=title, total_steps=total_steps)
    local = CompositeTracker([jsonl, console])
    if config.wandb is WandbMode.disabled:
        return local
    from llmscale.tracking.wandb import WandbTracker

    remote = WandbTracker(config, run_dir=run_dir, run_id=run_id, run_config=run_config, report=local.event)
    return CompositeTracker([jsonl, console, remote])


@contextmanager
def finishing(tracker: Tracker) -> Iterator[None]:
    """Finish the tracker with how the block ended: done, stopped (to be requeued), interrupted, lost (a worker, or
    weights on their way, so that it may go on) or failed."""
    status = "failed"
    try:
        yield
        status = "done"
    except Requeue:
        status = "stopped"
        raise
    except (WorkerLostError, DamagedWeightsError):
        status = "lost"
        raise
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        tracker.finish(status)
