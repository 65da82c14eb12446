"""The ways to run a supervised stage: one SPMD function of the frozen config, in this process, in a pool of Ray actors, or on
the ranks that torchrun or srun started.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from llmscale import distributed
from llmscale.checkpoint.run_directory import RunDirectory, open_run, wait_for_writer
from llmscale.cluster.pool import opened_pools
from llmscale.config import load
from llmscale.errors import Requeue, WorkerLostError
from llmscale.stages.config import SupervisedConfig
from llmscale.stages.restarting import restarting
from llmscale.stages.supervised import ROLE, SupervisedRun
from llmscale.tracking.console import ConsoleTracker
from llmscale.tracking.follow import following
from llmscale.training.stop import FILE as STOP
from llmscale.training.stop import signals
from llmscale.training.watchdog import end_process, forget, last_words


def run(config: SupervisedConfig) -> dict[str, Any] | None:
    """Start, resume, or return what a finished run found. Ranks that torchrun or srun started all come here; rank 0 opens
    the run, tells the others what came of it, and returns the result."""
    world = distributed.join(config.cluster.collective_timeout_s)
    if not world.is_main:
        (outcome,) = distributed.gather([])
        if outcome == TRAIN:
            train_here(config, config.run_dir)
        return None
    with ExitStack() as opened:
        outcome = "refused"
        try:
            directory = opened.enter_context(closing(open_run(config.run_dir, config)))
            finished = directory.result()
            outcome = TRAIN if finished is None else "finished"
            (config.run_dir / STOP).unlink(missing_ok=True)  # it asked an earlier attempt
        finally:
            distributed.gather([outcome])
        if finished is None:
            in_ray = world.size == 1 and (config.cluster.trainer.num_workers > 1 or config.cluster.address is not None)
            finished = train_on_ray(config, directory) if in_ray else train_here(config, directory.path)
            directory.finish(finished)
        return finished


TRAIN = "train"
LAST_SAVE_S = 10.0  # for a save in flight to end, when other ranks are gone


def train_here(config: SupervisedConfig, run_dir: Path) -> dict[str, Any]:
    with distributed.explaining_losses(ROLE):
        run = SupervisedRun(config, run_dir)
    try:
        with distributed.explaining_losses(ROLE):
            return run.train()
    except WorkerLostError as error:
        lost = error
        if not run.saver.settled(
            LAST_SAVE_S
        ):  # it waits for a rank that is gone, and would keep this process for an hour
            end_process(lambda: print(f"error: {lost}", file=sys.stderr, flush=True))
        raise


class TrainerRole:
    """One rank of a supervised stage in a Ray actor."""

    def __init__(self, config_file: str, run_dir: str):
        config: SupervisedConfig = load(Path(config_file))
        if distributed.world_from_environment().is_main:
            self.lock = wait_for_writer(Path(run_dir), config.cluster.start_timeout_s)
        with distributed.explaining_losses(ROLE):
            self.run = SupervisedRun(config, Path(run_dir))

    def num_steps(self) -> int:
        return self.run.num_steps

    def train(self) -> dict[str, Any]:
        with distributed.explaining_losses(ROLE):
            return self.run.train()


def train_on_ray(config: SupervisedConfig, directory: RunDirectory) -> dict[str, Any]:
    """Train in a pool of ranks; when one of them dies, in another pool from the last checkpoint on."""
    said = partial(last_words, directory.path, config.cluster.trainer.num_workers)
    return restarting(config, directory.path, lambda: train_in_pool(config, directory), said)


def train_in_pool(config: SupervisedConfig, directory: RunDirectory) -> dict[str, Any]:
    """Start a pool of ranks and show what rank 0 writes into the run directory."""
    run_dir = directory.path.resolve()
    forget(run_dir)
    roles = {ROLE: partial(TrainerRole, str(run_dir / "config.yaml"), str(run_dir))}
    with opened_pools(config.cluster, roles, directory.attempt_dir) as pools:
        total_steps = pools[ROLE].call(TrainerRole.num_steps).wait()[0]
        console = ConsoleTracker(config.tracking.console_every_s, title=config.stage, total_steps=total_steps)
        status = "failed"
        try:
            with following(run_dir, console), signals.deferred(run_dir / STOP):
                result = pools[ROLE].call(TrainerRole.train).wait()[0]
            status = "done"
        except Requeue:
            status = "stopped"
            raise
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if status not in ("done", "stopped"):  # else rank 0 has said so itself
                console.finish(status)
        return result
