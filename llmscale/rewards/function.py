"""A reward that the user writes as a Python function in a file of their own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import ConfigError, WorkerError
from llmscale.protocols import Score
from llmscale.rewards.config import FunctionConfig, OnError


class FunctionReward:
    """Calls `function(prompt, completion, fields) -> float` on each sample."""

    def __init__(self, config: FunctionConfig, tokenizer: PreTrainedTokenizerFast):
        file, _, name = config.path.rpartition(":")
        spec = importlib.util.spec_from_file_location("llmscale_user_reward", file)
        if spec is None or spec.loader is None or not Path(file).is_file():
            raise ConfigError(f"no such file: {file}", where="reward.path", fix="Give it as FILE.py:FUNCTION.")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the user's file may fail in any way
            raise ConfigError(f"cannot run {file}: {type(error).__name__}: {error}", where="reward.path") from error
        if not callable(getattr(module, name, None)):
            raise ConfigError(f"{file} has no function {name!r}", where="reward.path")
        self.path, self.function, self.on_error = config.path, getattr(module, name), config.on_error

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
