"""How long a supervised run is and what it does on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmscale.config import Problem, at_least


@dataclass
class TrainingConfig:
    num_steps: int | None = None  # optimizer steps; None: num_epochs passes over the data
    num_epochs: float = 1.0  # used where num_steps is None
    global_batch_size: int = 32  # examples of one optimizer step, over all ranks
    eval_every_steps: int = 100  # validation, where there is a validation split; also at the end
    save_every_steps: int = 100  # checkpoints; also at the end
    keep_checkpoints: int = 2  # newest ones kept on disk

    def problems(self) -> Iterator[Problem]:
        yield from at_least(
            self, num_steps=1, global_batch_size=1, eval_every_steps=1, save_every_steps=1, keep_checkpoints=1
        )
        if self.num_epochs <= 0:
            yield "num_epochs", f"must be above 0, is {self.num_epochs}", "One pass over the data is 1."
