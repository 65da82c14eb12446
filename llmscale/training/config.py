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
    keep_best: bool = False  # and the one of lowest eval/loss, of those saved at an evaluation
    # Stop after this many evaluations without a new best eval/loss; null: never
    early_stopping_evals: int | None = None
    # Steps of any 128 that may be skipped because their loss or gradient norm is not finite, or a spike; 0: none
    max_skipped_steps: int = 3
    # How often the weights go back to the last checkpoint when more steps than that are skipped; then the run stops
    max_rollbacks: int = 2
    # A spike is this many standard deviations above the mean of the last 128 steps (6 is usual); null: nothing finite is
    spike_threshold: float | None = None

    def problems(self) -> Iterator[Problem]:
        ones = ("num_steps", "global_batch_size", "eval_every_steps", "save_every_steps", "keep_checkpoints")
        yield from at_least(self, **dict.fromkeys((*ones, "early_stopping_evals"), 1))
        yield from at_least(self, max_skipped_steps=0, max_rollbacks=0)
        if self.num_epochs <= 0:
            yield "num_epochs", f"must be above 0, is {self.num_epochs}", "One pass over the data is 1."
        if self.spike_threshold is not None and self.spike_threshold <= 0:
            yield "spike_threshold", f"must be above 0, is {self.spike_threshold}", "6 is usual; null is none."
