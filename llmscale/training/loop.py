"""The one supervised loop. Whatever happens besides the step itself is a hook."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmscale.batch import Batch
from llmscale.protocols import Objective, TrainEngine

Metrics = dict[str, float]


@dataclass(frozen=True)
class Hook:
    """Calls `run(step, metrics)` after every `every`-th step and after the last one. Steps count from 1."""

    every: int
    run: Callable[[int, Metrics], None]

    def due(self, step: int, num_steps: int) -> bool:
        return step % self.every == 0 or step == num_steps


def train(
    engine: TrainEngine,
    objective: Objective,
    batches: Callable[[int], list[Batch]],
    num_steps: int,
    hooks: Sequence[Hook],
) -> None:
    """Train from the engine's own step to `num_steps`. `batches(step)` gives this rank's micro-batches of a step, a
    pure function of it, so that a resumed run sees what the uninterrupted one would have seen. Hooks run in order."""
    while engine.num_steps < num_steps:
        started = time.perf_counter()
        micro_batches = batches(engine.num_steps)
        loaded = time.perf_counter()
        means = engine.step(micro_batches, objective)
        ended = time.perf_counter()
        num_tokens = means.pop("num_tokens")
        metrics = {f"train/{name}": value for name, value in means.items()}
        metrics |= {"timing_s/data": loaded - started, "timing_s/step": ended - loaded}
        metrics["perf/tokens_per_s"] = num_tokens / (ended - started)
        for hook in hooks:
            if hook.due(engine.num_steps, num_steps):
                hook.run(engine.num_steps, metrics)
