"""Where rewards come from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

from omegaconf import MISSING

from llmscale.config import Problem, at_least, option


@dataclass
class RewardConfig:
    name: str = MISSING

    def needs_columns(self) -> list[str]:
        """Columns that every prompt's record must have."""
        return []


class Combine(Enum):
    """How the scores of an ensemble become one reward."""

    mean = "mean"
    minimum = "minimum"  # what the most sceptical member says
    lower_bound = "lower_bound"  # mean - std_coef x their standard deviation; Coste et al. 2024 take off the variance


def flattened(config: RewardConfig, where: str) -> Iterator[tuple[str, RewardConfig]]:
    """(dotted path, config) of a reward, or of each part of a sum."""
    if isinstance(config, SumConfig):
        for name, part in config.parts.items():
            yield from flattened(part, f"{where}.parts.{name}")
    else:
        yield where, config


@option("reward", "learned", builds="llmscale.rewards.learned:LearnedReward")
@dataclass
class LearnedConfig(RewardConfig):
    """A reward model trained by `llmscale reward`, or several."""

    name: str = "learned"
    path: str = MISSING  # its run directory or Hugging Face folder
    ensemble: list[str] = field(default_factory=list)  # more of them: runs of other seeds on the same rankings
    combine: Combine = Combine.mean  # of an ensemble's scores
    std_coef: float = 1.0  # deviations that combine=lower_bound takes off; 0 or more
    unfinished: float | None = None  # reward of a completion cut off at the length limit; None: as the model scores it

    def members(self) -> list[tuple[str, str]]:
        """(the key that names it, its path) of each model."""
        return [("reward.path", self.path), *((f"reward.ensemble[{i}]", p) for i, p in enumerate(self.ensemble))]

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, std_coef=0)
        if self.combine is not Combine.mean and not self.ensemble:
            what = f"{self.combine.name} of a single model is its own score"
            yield "combine", what, "Name more models in reward.ensemble=[...], or leave it out."
        if len({self.path, *self.ensemble}) <= len(self.ensemble):
            yield "ensemble", "names a model twice", "Name each once, reward.path is one of them."


class Aggregation(Enum):
    """How the probabilities of a solution's steps become one reward."""

    minimum = "minimum"
    product = "product"
    last = "last"


@option("reward", "process", builds="llmscale.rewards.process:ProcessReward")
@dataclass
class ProcessRewardConfig(RewardConfig):
    """A process reward model, trained by `llmscale reward objective=process`."""

    name: str = "process"
    path: str = MISSING  # its run directory or Hugging Face folder
    aggregation: Aggregation = Aggregation.product


class OnError(Enum):
    stop = "stop"  # end the run, naming the sample
    exclude = "exclude"  # leave the sample out of the step; counted and recorded


@option("reward", "function", builds="llmscale.rewards.function:FunctionReward")
@dataclass
class FunctionConfig(RewardConfig):
    """A Python function of yours: `def reward(prompt: str, completion: str, fields: dict) -> float`."""

    name: str = "function"
    path: str = MISSING  # FILE.py:FUNCTION
    on_error: OnError = OnError.stop  # where the function raises, or returns no number

    def problems(self) -> Iterator[Problem]:
        if ".py:" not in self.path:
            yield "path", f"must be FILE.py:FUNCTION, is {self.path!r}", "For example rewards.py:brevity."


@option("reward", "http", builds="llmscale.rewards.http:HttpReward")
@dataclass
class HttpConfig(RewardConfig):
    """A service of yours that scores by HTTP; llmscale/rewards/http.py has the request and the answer."""

    name: str = "http"
    url: str = MISSING
    batch_size: int = 32  # samples of one request
    timeout_s: float = 30.0  # of one attempt
    retries: int = 4  # further attempts after a lost connection, a timeout, 408, 425, 429, 500, 502, 503 or 504
    backoff_s: float = (
        0.5  # wait before the second retry; doubled each time, and a Retry-After of up to a minute is kept
    )
    token_env: str | None = None  # environment variable with a token, sent as `Authorization: Bearer`

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, batch_size=1, retries=0, backoff_s=0)
        if self.timeout_s <= 0:
            yield "timeout_s", f"must be above 0, is {self.timeout_s}", "It is the time of one attempt, in seconds."
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # half an IPv6 address, or a port that is none
            parts, known = urlsplit(""), None
        if not known:
            yield "url", f"{self.url!r} is no http address", "For example http://127.0.0.1:8000/score."
        if parts.password is not None:
            yield "url", "holds a password", "Put a token into an environment variable and name that in token_env."


# ---------------------------------------------------------------- rules


class Match(Enum):
    exact = "exact"  # the whole text, white space at its ends aside
    number = "number"  # the final number in it


@dataclass
class RuleConfig(RewardConfig):
    """What rules about text share."""

    within: str | None = (
        None  # read only the last <within>...</within>, which must be there; None: the whole completion
    )

    def problems(self) -> Iterator[Problem]:
        if self.within is not None:
            yield from _tag_problems("within", self.within)


@option("reward", "answer", builds="llmscale.rewards.rules:AnswerReward")
@dataclass
class AnswerConfig(RuleConfig):
    """1 where the completion gives the reference answer of its prompt's record, else 0."""

    name: str = "answer"
    column: str = "answer"  # of the record, holding the reference answer
    match: Match = Match.exact

    def needs_columns(self) -> list[str]:
        return [self.column]


@option("reward", "regex", builds="llmscale.rewards.rules:RegexReward")
@dataclass
class RegexConfig(RuleConfig):
    """1 where a regular expression is found, else 0."""

    name: str = "regex"
    pattern: str = MISSING  # in the syntax of the package `regex`; (?i) (?s) (?m) stand at its beginning
    whole: bool = False  # it must match the whole text, white space at its ends aside
    timeout_s: float = 1.0  # of one text; a sample that takes longer cannot be scored

    def problems(self) -> Iterator[Problem]:
        import regex

        yield from super().problems()
        if self.timeout_s <= 0:
            yield "timeout_s", f"must be above 0, is {self.timeout_s}", "A second is plenty."
        try:
            regex.compile(self.pattern)
        except regex.error as error:
            yield "pattern", f"{self.pattern!r} is no regular expression: {error}", "Mend it; put it in single quotes."


@option("reward", "format", builds="llmscale.rewards.rules:FormatReward")
@dataclass
class FormatConfig(RuleConfig):
    """1 where the text is these elements, each once, in this order, none of them empty, and nothing beside them."""

    name: str = "format"
    tags: list[str] = field(default_factory=lambda: ["think", "answer"])  # <think>...</think><answer>...</answer>

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for tag in self.tags:
            yield from _tag_problems("tags", tag)
        if not self.tags or len(set(self.tags)) < len(self.tags):
            yield "tags", f"must name at least one element, each once, is {self.tags}", "For example [think,answer]."


class Unit(Enum):
    tokens = "tokens"  # that the policy produced, the one that ends the completion among them
    words = "words"  # between white space
    characters = "characters"


@option("reward", "length", builds="llmscale.rewards.rules:LengthReward")
@dataclass
class LengthConfig(RewardConfig):
    """1 for a length from `shortest` to `longest`, falling in a line to 0 over `slope` units on either side."""

    name: str = "length"
    unit: Unit = Unit.tokens
    shortest: int = 1
    longest: int | None = None  # None: any
    slope: int = 0  # 0: a step

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, shortest=0, slope=0)
        if self.longest is not None and self.longest < self.shortest:
            yield "longest", f"{self.longest} is below shortest={self.shortest}", "Swap them."
        if self.longest is None and self.shortest == 0:
            yield "longest", "any length gets 1", "Set longest, or shortest above 0."


@option("reward", "safety", builds="llmscale.rewards.safety:SafetyReward")
@dataclass
class SafetyConfig(RuleConfig):
    """1 where none of your words or phrases occurs, else 0: whole words, in any case, with or without accents."""

    name: str = "safety"
    path: str | None = None  # text file with one word or phrase a line; # begins a comment
    words: list[str] = field(default_factory=list)  # more of them

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.path is None and not self.words:
            yield "path", "there is no word that could be unsafe", "Name a file of words, one a line, or set words."
        if any(not w.strip() for w in self.words):
            yield "words", "holds an empty word", "Take it out."


class Language(Enum):
    json = "json"  # one value as RFC 8259 has it
    python = "python"  # at least one statement, parsed and never run
    lark = "lark"  # a grammar of yours; needs the package `lark`: pip install llmscale[grammar]


class Parser(Enum):
    earley = "earley"  # any context-free grammar; slow on long texts
    lalr = "lalr"  # fast, and refuses a grammar that one token of look-ahead cannot decide


@option("reward", "grammar", builds="llmscale.rewards.grammar:GrammarReward")
@dataclass
class GrammarConfig(RuleConfig):
    """1 where the text parses, else 0. A text that is one ``` block is read without its fences."""

    name: str = "grammar"
    language: Language = Language.json
    path: str | None = None  # file with the grammar, for language=lark
    start: str = "start"  # its start rule
    parser: Parser = Parser.earley

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if (self.path is None) == (self.language is Language.lark):
            what = "language=lark needs a grammar" if self.path is None else f"{self.language.name} has its own grammar"
            yield "path", what, "Set both language=lark and path=FILE.lark, or neither."


@option("reward", "clauses", builds="llmscale.rewards.clauses:ClausesReward")
@dataclass
class ClausesConfig(RuleConfig):
    """Legal drafting: clauses numbered in order at every level, none missing or empty, and cross references to clauses that
    exist. 1 where all is right, less the share of clauses and references that are at fault."""

    name: str = "clauses"
    # How the first clause of each level is numbered, outermost first: 1, a, A, i or I between what marks it; or 1. 1.1 1.1.1
    levels: str = "1. (a) (i)"
    min_clauses: int = 1  # fewer of them, at all levels together: 0

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from at_least(self, min_clauses=1)
        levels = self.levels.split()
        for depth, level in enumerate(levels):
            if not LEVEL.fullmatch(level):
                yield "levels", f"{level!r} is no numbering", "Write the first number of each level, such as 1. (a) (i)"
            elif (dots := level.strip("(.)").count(".")) and (
                dots != depth or levels[depth - 1].strip("(.)")[0] != "1"
            ):
                yield "levels", f"{level!r} cannot stand at level {depth + 1}", "Each has one number more: 1. 1.1 1.1.1"
        if not levels or len(set(levels)) < len(levels):
            yield "levels", f"must name at least one level, each once, is {self.levels!r}", "For example 1. (a) (i)"


LEVEL = re.compile(r"(?P<left>\(?)(?P<first>1(?:\.1)*|a|A|i|I)(?P<right>[.)]?)")


class Check(Enum):
    equivalent = "equivalent"  # the text is a formula with the same truth table as the record's
    satisfies = (
        "satisfies"  # the text is an assignment, such as p=true, q=false, under which the record's formula is true
    )


@option("reward", "logic", builds="llmscale.rewards.logic:LogicReward")
@dataclass
class LogicConfig(RuleConfig):
    """1 where a propositional formula or assignment is right, else 0, by exhaustive truth table."""

    name: str = "logic"
    column: str = "formula"  # of the record, holding the reference formula
    check: Check = Check.equivalent

    def needs_columns(self) -> list[str]:
        return [self.column]


@option("reward", "environment", builds="llmscale.rewards.environment:EnvironmentReward")
@dataclass
class EnvironmentRewardConfig(RewardConfig):
    """The sum of what `environment` gave for each turn, each part at its own turn."""

    name: str = "environment"


# ---------------------------------------------------------------- several


@option("reward", "sum", builds="llmscale.rewards.weighted:SumReward")
@dataclass
class SumConfig(RewardConfig):
    """The weighted sum of several rewards, each logged under its name."""

    name: str = "sum"
    parts: dict[str, RewardConfig] = field(default_factory=dict)  # name of yours -> a reward: reward.parts.brief=length
    weights: dict[str, float] = field(default_factory=dict)  # name -> weight, 1 where none is set; 0: only watched

    def problems(self) -> Iterator[Problem]:
        if not self.parts:
            yield "parts", "there is nothing to add up", "For example reward.parts.brief=length."
        for name, part in self.parts.items():
            if name in RESERVED or not re.fullmatch(r"\w[\w-]*", name):
                yield f"parts.{name}", "this name cannot stand in a metric's", f"Not one of {', '.join(RESERVED)}."
            if isinstance(part, SumConfig):
                yield f"parts.{name}", "a sum cannot hold a sum", "Name its parts in the outer one."
        for name in self.weights:
            if name not in self.parts:
                yield f"weights.{name}", "there is no such part", f"There is: {', '.join(self.parts) or 'none'}."
        if self.parts and not any(self.weights.get(name, 1.0) for name in self.parts):
            yield "weights", "every weight is 0", "Give one part another weight."


RESERVED = ("mean", "std", "true", "excluded", "excluded_with_group", "true_excluded")  # names beside it in reward/...


def _tag_problems(path: str, tag: str) -> Iterator[Problem]:
    if not re.fullmatch(r"[A-Za-z_][\w.-]*", tag):
        yield path, f"{tag!r} is no name of an element", "Without brackets, such as answer."


@option("reward", "code", builds="llmscale.rewards.code:CodeReward")
@dataclass
class CodeConfig(RewardConfig):
    """The completion is Python: 1 where it passes the tests of its prompt's record, else 0. It runs in a sandbox."""

    name: str = "code"
    column: str = "tests"  # of the record: Python with assertions, or a list of such, each one a test
    partial: bool = False  # the reward is the fraction of the tests that pass
    timeout_s: float = 5.0  # of a program and its tests together
    memory_bytes: int = 256 * 2**20  # address space of a process; 64 MiB or more
    max_processes: int = 4  # and threads that a program may start
    output_bytes: int = 2**16  # that it may print
    files_bytes: int = 2**24  # that it may write in its directory; 64 KiB or more
    num_workers: int | None = None  # programs that run side by side; null: as many as there are processors

    def needs_columns(self) -> list[str]:
        return [self.column]

    def problems(self) -> Iterator[Problem]:
        yield from at_least(self, timeout_s=0.1, memory_bytes=64 * 2**20, max_processes=0)
        yield from at_least(self, output_bytes=1, files_bytes=2**16, num_workers=1)
