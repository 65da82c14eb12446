"""Rewards that a rule decides."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.rewards.config import AnswerConfig, Match

# Digits, perhaps in groups of three split by commas, perhaps with decimals or a sign that does not join two words.
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def final_number(text: str) -> str | None:
    """The last number in the text without thousands separators or trailing zeros after the point; None without one."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return number


class AnswerReward:
    """1.0 where a completion gives the reference answer of its prompt, else 0.0."""

    def __init__(self, config: AnswerConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [float(self._matches(t)) for t in trajectories]

    def _matches(self, trajectory: Trajectory) -> bool:
        reference = str(trajectory.prompt.fields[self.config.column])
        if self.config.match is Match.number:
            given = final_number(trajectory.completion)
            return given is not None and given == final_number(reference)
        return trajectory.completion.strip() == reference.strip()
