"""The one supervised loop. Whatever happens besides the step itself is a hook."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmscale import distributed
from llmscale.batch import Batch
from llmscale.errors import Requeue
from llmscale.phases import phase, take_spent_s
from llmscale.protocols import Objective, TrainEngine
from llmscale.training.guard import Guard

Metrics = dict[str, float]
# Phases whose seconds are shown. Those inside a step are launches, not work, on a CUDA device.
TIMED = {"data": "data", "step": "step", "save": "save"}
TIMED_ON_CPU = TIMED | {f"step/{name}": name for name in ("forward", "backward", "optimizer")}


@dataclass(frozen=True)
class Hook:
    """Calls `run(step, metrics)` after every `every`-th step and after the last one. Steps count from 1."""

    every: int
    run: Callable[[int, Metrics], None]
    before_stop: bool = False  # also where the run is asked to stop, which is no end: it will go on from there


def train(
    engine: TrainEngine,
    objective: Objective,
    batches: Callable[[int], list[Batch]],
    num_steps: int,
    hooks: Sequence[Hook],
    guard: Guard,
    *,
    restore: Callable[[], int | None] = lambda: None,
    ended: Callable[[], str | None] = lambda: None,
    stop_asked: Callable[[], bool] = lambda: False,
) -> None:
    """Train from the engine's own step to `num_steps`, or until `ended()` gives a reason. `batches(step)` gives this rank's
    micro-batches of a step, a pure function of it, so that a resumed run sees what the uninterrupted one would have seen.
    Hooks run in order. `restore` is what a rollback does (see `Guard`); `stop_asked()` need not be true on every rank.

    Raises: Requeue on every rank once the run was asked to stop and the hooks that want it have run; NumericsError.
    """
    while engine.num_steps < num_steps and not ended():
        started = time.perf_counter()
        with phase("data"):
            micro_batches = batches(engine.num_steps)
        with phase("step"):
            means = engine.step(micro_batches, objective, guard.accept)
        seconds, step = time.perf_counter() - started, engine.num_steps
        metrics = step_metrics(means, seconds)
        if guard.refusal is not None:
            metrics["train/skipped"] = 1.0
        if guard.settle(step, means):
            with phase("roll back"):
                guard.roll_back(step, restore)
            engine.num_steps = step  # past the data that it met on the way here
        due: list[Hook] = []
        for hook in hooks:
            if step % hook.every == 0 or step == num_steps or ended():  # which a hook before this one may decide
                hook.run(step, metrics)
                due.append(hook)
        if distributed.all_reduce({"stop": float(stop_asked())}, op="max")["stop"]:
            for hook in hooks:
                if hook.before_stop and hook not in due:
                    hook.run(step, metrics)
            raise Requeue(f"stopped and saved at step {step}; the same command resumes")


def step_metrics(means: dict[str, float], seconds: float) -> Metrics:
    """A step's numbers under the names that are logged. `timing_s/save` and what else is no part of a step is that of the
    phases since the step before."""
    metrics = {f"train/{name}": value for name, value in means.items() if name != "num_tokens"}
    timed = TIMED if torch.cuda.is_available() else TIMED_ON_CPU
    metrics |= {f"timing_s/{timed[path]}": spent for path, spent in take_spent_s().items() if path in timed}
    return metrics | {"perf/tokens_per_s": means["num_tokens"] / seconds, "perf/peak_memory_gb": peak_memory_gb()}


def peak_memory_gb() -> float:
    """Of this rank: on its CUDA device, else of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
