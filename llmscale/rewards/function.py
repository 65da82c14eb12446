"""A reward that the user writes as a Python function in a file of their own."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.config import from_file
from llmscale.errors import WorkerError
from llmscale.protocols import Score
from llmscale.rewards.config import FunctionConfig, OnError


class FunctionReward:
    """Calls `function(prompt, completion, fields) -> float` on each sample."""

    def __init__(self, config: FunctionConfig, tokenizer: PreTrainedTokenizerFast):
        self.function = from_file(config.path, "reward.path")
        self.path, self.on_error = config.path, config.on_error

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        return [self._score(t) for t in trajectories]

    def _score(self, trajectory: Trajectory) -> Score:
        try:
            given = self.function(trajectory.prompt.text, trajectory.completion, dict(trajectory.prompt.fields))
            return Score(float(given))
        except Exception as error:  # the user's code may raise anything; it is named and passed on, never a silent zero
            what = f"{type(error).__name__}: {error}"
            if self.on_error is OnError.exclude:
                return Score(None, why=f"{self.path}: {what}")
            where = f"{self.path}, draw {trajectory.draw_id}, sample {trajectory.sample_index}"
            fix = "Mend the function; reward.on_error=exclude leaves such samples out."
            raise WorkerError(what, where=where, fix=fix) from error
