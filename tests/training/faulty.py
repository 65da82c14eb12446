"""An objective whose loss goes wrong on chosen batches, for tests of what the loop does about it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmscale.batch import Batch
from llmscale.engine.config import SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.objectives.causal_lm import CausalLM
from llmscale.objectives.config import CausalLMConfig
from llmscale.optim.config import OptimConfig
from llmscale.protocols import Forward, LossSums
from tests.tiny import language_model, token_examples

LENGTHS = [6, 9]


class Faulty(CausalLM):
    """Each loss is multiplied by its batch's `factor`."""

    def loss(self, forward: Forward, batch: Batch) -> LossSums:
        sums = super().loss(forward, batch)
        return LossSums({name: term * batch["factor"] for name, term in sums.terms.items()})


OBJECTIVE = Faulty(CausalLMConfig())


def engine(num_steps: int) -> SingleEngine:
    return SingleEngine(SingleConfig(), language_model(), OptimConfig(warmup_steps=2), num_steps)


def batches(factors: dict[int, float], asked: list[int] | None = None) -> Callable[[int], list[Batch]]:
    """What `loop.train` asks for: at the steps of `factors` (from 1, as they are counted afterwards) the loss is multiplied."""

    def of_step(step: int) -> list[Batch]:
        if asked is not None:
            asked.append(step)
        batch = OBJECTIVE.prepare(token_examples(LENGTHS, seed=step))
        batch.tensors["factor"] = torch.tensor(factors.get(step + 1, 1.0))
        return [batch]

    return of_step
