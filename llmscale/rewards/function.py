"""A reward that the user writes as a Python function in a file of their own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import ConfigError, WorkerError
from llmscale.rewards.config import FunctionConfig


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
        self.path, self.function = config.path, getattr(module, name)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [self._score(t) for t in trajectories]

    def _score(self, trajectory: Trajectory) -> float:
        try:
            return float(self.function(trajectory.prompt.text, trajectory.completion, dict(trajectory.prompt.fields)))
        except Exception as error:  # the user's code may raise anything; it is named and passed on, never a silent zero
            where = f"{self.path}, draw {trajectory.draw_id}, sample {trajectory.sample_index}"
            raise WorkerError(f"{type(error).__name__}: {error}", where=where, fix="Mend the function.") from error
