"""Rewards for code that passes its tests. Completions run in a sandbox: see `sandbox.py` for what that means."""

from __future__ import annotations

import ast
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.errors import DataError
from llmscale.protocols import Score
from llmscale.rewards.config import CodeConfig
from llmscale.rewards.inside.limits import BREACHES, Limits, Reason
from llmscale.rewards.sandbox import Program, Result, Sandbox

_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_ORDINARY = (Reason.passed, Reason.failed, Reason.syntax)  # not worth a line in the log
_logger = logging.getLogger(__name__)


class CodeReward:
    """1.0 where all tests pass, or the fraction that does. `results` are those of the last call."""

    def __init__(self, config: CodeConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config
        limits = Limits(
            config.timeout_s, config.memory_bytes, config.max_processes, config.output_bytes, config.files_bytes
        )
        self.sandbox = Sandbox(limits, config.num_workers or len(os.sched_getaffinity(0)))
        self.results: list[Result] = []

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        programs = [Program(extract_code(t.said[-1]), self._tests(t)) for t in trajectories]
        self.results = self.sandbox.run(programs)
        for trajectory, result in zip(trajectories, self.results, strict=True):
            if result.reason not in _ORDINARY:
                _logger.warning("draw %d, sample %d: %s", trajectory.draw_id, trajectory.sample_index, result)
        return [
            Score(self.reward(result), _shares(result.reason), "" if result.reason is Reason.passed else str(result))
            for result in self.results
        ]

    def reward(self, result: Result) -> float:
        if self.config.partial and result.reason not in BREACHES:
            return sum(result.passed) / len(result.passed)
        return float(result.reason is Reason.passed)

    def _tests(self, trajectory: Trajectory) -> tuple[str, ...]:
        try:
            return split_tests(trajectory.prompt.fields[self.config.column])
        except (SyntaxError, ValueError) as error:
            where = f"draw {trajectory.draw_id}, column {self.config.column!r}"
            what = f"the tests of {trajectory.prompt.text!r} cannot be run: {error}"
            raise DataError(what, where=where, fix="Give Python with assertions, or a list of such.") from error


def _shares(reason: Reason) -> dict[str, float]:
    """So that the mean of each is the share of programs that ended so."""
    return {f"code_{other.name}": float(other is reason) for other in Reason}


def extract_code(completion: str) -> str:
    """The last fenced block that says Python, else the last one, else the whole text; a block that was cut off counts."""
    blocks = _FENCE.findall(completion)
    python = [code for language, code in blocks if language.lower() in ("python", "py", "python3")]
    return (python or [code for _, code in blocks] or [completion])[-1]


def split_tests(given: Any) -> tuple[str, ...]:
    """A list's entries are its tests. Of a text each assertion at its top level is one, together with what stands before it
    since the last; without any it is one test.

    Raises: SyntaxError for tests that are no Python, ValueError where there is none.
    """
    if isinstance(given, str):
        groups: list[list[ast.stmt]] = [[]]
        for statement in ast.parse(given).body:
            groups[-1].append(statement)
            if isinstance(statement, ast.Assert):
                groups.append([])
        tests = [ast.unparse(ast.Module(group, [])) for group in groups if group]
    elif isinstance(given, Sequence) and all(isinstance(test, str) for test in given):
        tests = [test for test in given if test.strip()]
    else:
        raise ValueError(f"they are {type(given).__name__}")
    if not tests:
        raise ValueError("there are none")
    for test in tests:
        compile(test, "tests", "exec")
    return tuple(tests)
