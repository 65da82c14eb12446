"""Rewards that a rule decides: the right answer, a pattern, a format, a length. Each rule is a function that can be called
alone, and a class that applies it to samples."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import regex
from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.protocols import Score
from llmscale.rewards.config import AnswerConfig, FormatConfig, LengthConfig, Match, RegexConfig, RuleConfig, Unit
from llmscale.rewards.numbers import canonical, last_number

Config = TypeVar("Config", bound=RuleConfig)

# GSM8K's "#### 1,200 apples"; not a heading, such as "#### Step 2" or "#### 2. Why".
_MARK = re.compile(r"^\s*####[^\S\n]*+(?!\d+[.)][^\S\n]+\S)([^\w\n]{0,4}(?:\d|frac)[^\n]*)$", re.MULTILINE)


class Rule(ABC, Generic[Config]):
    """Scores the text of each sample by itself: of several turns the policy's last, which is its answer."""

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerFast):
        self.config = config

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        return [self._score(t) for t in trajectories]

    def _score(self, trajectory: Trajectory) -> Score:
        tag, text = self.config.within, self.text(trajectory)
        read = text if tag is None else element(text, tag)
        return Score(0.0, why=f"there is no <{tag}>...</{tag}>") if read is None else self.score(read, trajectory)

    def text(self, trajectory: Trajectory) -> str:
        return trajectory.said[-1]

    @abstractmethod
    def score(self, text: str, trajectory: Trajectory) -> Score: ...


def element(text: str, tag: str) -> str | None:
    """What stands in the last <tag>...</tag>; None where there is none."""
    before, closing, _ = text.rpartition(f"</{tag}>")
    _, opening, inside = before.rpartition(f"<{tag}>")
    return inside if opening and closing else None


def reference_of(trajectory: Trajectory, column: str) -> str | None:
    """A column of the prompt's record as text; None where it is null or blank, which no completion can match."""
    value = trajectory.prompt.fields[column]
    return None if value is None or not str(value).strip() else str(value)


# ---------------------------------------------------------------- answer


def final_number(text: str) -> str | None:
    """The number that the text ends on, spelt so that equal numbers are equal texts; None without one.

    The spelling is a decimal without separators, unit or needless zeros where that ends, else the reduced fraction:
    "$1,234.50" -> "1234.5", "3/4" -> "0.75", "2/6" -> "1/3", "1 1/2" -> "1.5", "2e3" -> "2000". Where the text says which
    number is the answer, that one is taken: the last \\boxed{...} with a number, else the last line "#### number". Otherwise it
    is the last number of all. `llmscale.rewards.numbers` has what is read as a number.
    """
    for read in (*reversed(_boxed(text)), *reversed([m[1] for m in _MARK.finditer(text)]), text):
        value = last_number(read)
        if value is not None:
            return canonical(value)
    return None


def _boxed(text: str) -> list[str]:
    """What stands in each \\boxed{...}, up to the brace that closes it, in the order of the braces that open them."""
    found: dict[int, str] = {}
    opened: list[int | None] = []  # where the content of each open brace begins; None: not a box
    for match in re.finditer(r"\\boxed\s?\{|[{}]", text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else None)
        elif opened and (start := opened.pop()) is not None:
            found[start] = text[start : match.start()]
    return [found[start] for start in sorted(found)]


class AnswerReward(Rule[AnswerConfig]):
    """1.0 where a completion gives the reference answer of its prompt, else 0.0."""

    def score(self, text: str, trajectory: Trajectory) -> Score:
        reference = reference_of(trajectory, self.config.column)
        if reference is None:
            return Score(None, why=f"the record's {self.config.column} is empty")
        if self.config.match is Match.exact:
            return Score(float(text.strip() == reference.strip()))
        right, given = final_number(reference), final_number(text)
        if right is None:
            return Score(None, why=f"the reference {self.config.column}={reference!r} holds no number")
        return Score(float(given == right), why=f"{given or 'no number'}, right is {right}")


# ---------------------------------------------------------------- pattern, format, length


class RegexReward(Rule[RegexConfig]):
    """1.0 where the pattern is found."""

    def __init__(self, config: RegexConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__(config, tokenizer)
        self.pattern = regex.compile(config.pattern)

    def score(self, text: str, trajectory: Trajectory) -> Score:
        find = self.pattern.fullmatch if self.config.whole else self.pattern.search
        try:
            return Score(
                float(find(text.strip() if self.config.whole else text, timeout=self.config.timeout_s) is not None)
            )
        except TimeoutError:  # a pattern such as (a+)+b takes for ever on the wrong text
            return Score(None, why=f"the pattern took longer than {self.config.timeout_s:g} s")


def format_fault(text: str, tags: Sequence[str]) -> str:
    """What keeps the text from being <tag>...</tag> for each tag, in order, each once and not empty, with nothing beside
    them; empty where nothing does."""
    rest = text.strip()
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        for mark in (opening, closing):
            if text.count(mark) != 1:
                return f"{mark} stands there {text.count(mark)} times"
        if not rest.startswith(opening):
            return f"{opening} does not stand where it should"
        inside, closed, rest = rest.removeprefix(opening).partition(closing)
        if not closed or not inside.strip():
            return f"{opening}...{closing} is empty" if closed else f"{closing} does not stand where it should"
        if any(mark in inside for other in tags for mark in (f"<{other}>", f"</{other}>")):
            return f"another element stands in {opening}"
        rest = rest.lstrip()
    return "there is text beside the elements" if rest else ""


class FormatReward(Rule[FormatConfig]):
    """1.0 where the elements are all there is."""

    def score(self, text: str, trajectory: Trajectory) -> Score:
        fault = format_fault(text, self.config.tags)
        return Score(float(not fault), why=fault)


def length_score(length: float, shortest: float, longest: float | None, slope: float) -> float:
    """1 from `shortest` to `longest`, falling in a line to 0 over `slope` on either side; a step where that is 0."""
    beyond = max(shortest - length, 0 if longest is None else length - longest, 0)
    return max(0.0, 1.0 - beyond / slope) if slope > 0 else float(beyond == 0)


class LengthReward:
    """By the number of tokens, words or characters."""

    def __init__(self, config: LengthConfig, tokenizer: PreTrainedTokenizerFast):
        self.config = config

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[Score]:
        return [self._score(self._length(t)) for t in trajectories]

    def _score(self, length: int) -> Score:
        value = length_score(length, self.config.shortest, self.config.longest, self.config.slope)
        return Score(value, why=f"{length} {self.config.unit.name}")

    def _length(self, trajectory: Trajectory) -> int:
        if self.config.unit is Unit.tokens:
            return trajectory.completion_len
        return sum(len(text.split()) if self.config.unit is Unit.words else len(text) for text in trajectory.said)
