"""Propositional logic: a formula is read by a parser of its own (nothing is evaluated as code) and decided by its whole truth
table. A table is one integer of 2^n bits, bit k for the k-th assignment, so that 16 variables cost microseconds.

    not      ! ~ ¬ - not \\lnot \\neg           xor      ^ ⊕ xor \\oplus
    and      & && ∧ /\\ * and \\land \\wedge     implies  -> => → ⇒ implies \\to \\rightarrow \\implies
    or       | || ∨ \\/ + or \\lor \\vee         iff      <-> <=> ↔ ⇔ iff == \\leftrightarrow \\iff

Binding from tight to loose: not, and, xor, or, implies (to the right), iff. true, false, ⊤, ⊥, 1, 0; a variable is a
letter with letters, digits and _ after it, case kept; `v` is a variable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerFast

from llmscale.batch import Trajectory
from llmscale.protocols import Score
from llmscale.rewards.config import Check, LogicConfig
from llmscale.rewards.rules import Rule, reference_of

MAX_VARIABLES = 16
MAX_SYMBOLS = 2000
MAX_DEPTH = 100  # of brackets, negations and implications within each other

_SIGNS = {
    "iff": ["<->", "<=>", "↔", "⇔", "iff", "==", "\\leftrightarrow", "\\Leftrightarrow", "\\iff"],
    "implies": ["->", "=>", "→", "⇒", "implies", "\\to", "\\rightarrow", "\\Rightarrow", "\\implies"],
    "and": ["/\\", "&&", "&", "∧", "*", "and", "\\land", "\\wedge"],
    "or": ["\\/", "||", "|", "∨", "+", "or", "\\lor", "\\vee"],
    "xor": ["^", "⊕", "xor", "\\oplus"],
    "not": ["!", "~", "¬", "-", "not", "\\lnot", "\\neg"],
    "true": ["true", "⊤", "1", "\\top"],
    "false": ["false", "⊥", "0", "\\bot"],
    "(": ["(", "["],
    ")": [")", "]"],
}
_KIND = {sign: kind for kind, signs in _SIGNS.items() for sign in signs}
_SYMBOL = re.compile(r"\s*(?:(?P<word>\\?[A-Za-z]\w*)|(?P<sign><->|<=>|->|=>|==|/\\|\\/|&&|\|\||[^\s\w]|[01](?!\w)))")
_BINDS = {"iff": 1, "implies": 2, "or": 3, "xor": 4, "and": 5}
Symbol = tuple[str, str]  # (kind, text); kind "name" is a variable
Formula = tuple[Symbol, ...]  # in postfix order, so that no depth of nesting is too much for what reads it


class FormulaError(ValueError):
    """The text is no formula."""


@dataclass
class _Reader:
    """Precedence climbing over the symbols; `postfix` is what it has read."""

    symbols: list[Symbol]
    postfix: list[Symbol] = field(default_factory=list)
    at: int = 0

    @property
    def kind(self) -> str:
        return self.symbols[self.at][0]

    def formula(self, loosest: int, depth: int) -> None:
        self.operand(depth)
        while (binds := _BINDS.get(self.kind, 0)) >= loosest:
            symbol = self.symbols[self.at]
            self.at += 1
            self.formula(binds if symbol[0] == "implies" else binds + 1, depth + 1)
            self.postfix.append(symbol)

    def operand(self, depth: int) -> None:
        symbol = kind, text = self.symbols[self.at]
        self.at += 1
        if depth > MAX_DEPTH:
            raise FormulaError("nested too deeply")
        if kind == "not":
            self.operand(depth + 1)
        elif kind == "(":
            self.formula(1, depth + 1)
            if self.kind != ")":
                raise FormulaError(f"a bracket is not closed before {self.symbols[self.at][1]!r}")
            self.at += 1
            return
        elif kind not in ("true", "false", "name"):
            raise FormulaError(f"{text!r} stands where a variable should")
        self.postfix.append(symbol)


def parse(text: str) -> Formula:
    """Raises: FormulaError for what is no formula."""
    reader = _Reader([*_symbols(text), ("end", "the end")])
    reader.formula(1, 0)
    if reader.kind != "end":
        raise FormulaError(f"{reader.symbols[reader.at][1]!r} stands after the formula")
    return tuple(reader.postfix)


def _symbols(text: str) -> list[Symbol]:
    text = text.strip().rstrip(".").strip("$ \n")
    found: list[Symbol] = []
    at = 0
    while at < len(text):
        match = _SYMBOL.match(text, at)
        sign = (match["sign"] or (match["word"] if match["word"] in _KIND else None)) if match else None
        word = match["word"] if match else None
        known = _KIND.get(sign or "") or _KIND.get((word or "").lower())
        if match is None or (not known and (word is None or word.startswith("\\"))):
            raise FormulaError(f"{text[at : at + 10]!r} is no part of a formula")
        found.append((known, match[0].strip()) if known else ("name", word or ""))
        at = match.end()
        if len(found) > MAX_SYMBOLS:
            raise FormulaError(f"longer than {MAX_SYMBOLS} symbols")
    return found


def variables(formula: Formula) -> set[str]:
    return {text for kind, text in formula if kind == "name"}


def table(formula: Formula, names: Sequence[str]) -> int:
    """The truth table over `names`: bit k is the value where variable i is bit i of k."""
    every = (1 << 2 ** len(names)) - 1
    # Variable i: runs of 2^i zeros and 2^i ones. every // (2^2^i + 1) has ones in the lower half of each pair of runs.
    return _evaluate(formula, {name: every // ((1 << 2**i) + 1) << 2**i for i, name in enumerate(names)}, every)


def _evaluate(formula: Formula, columns: Mapping[str, int], every: int) -> int:
    """Every bit by itself; `every` has all of them set."""
    stack: list[int] = []
    for kind, text in formula:
        if kind == "name":
            stack.append(columns[text])
        elif kind in ("true", "false"):
            stack.append(every if kind == "true" else 0)
        elif kind == "not":
            stack.append(every ^ stack.pop())
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(_COMBINED[kind](left, right, every))
    return stack.pop()


_COMBINED: dict[str, Callable[[int, int, int], int]] = {
    "and": lambda a, b, every: a & b,
    "or": lambda a, b, every: a | b,
    "xor": lambda a, b, every: a ^ b,
    "implies": lambda a, b, every: (every ^ a) | b,
    "iff": lambda a, b, every: every ^ a ^ b,
}


def equivalent(one: Formula, other: Formula) -> bool:
    """Whether the two are true under the same assignments. Raises: FormulaError for too many variables."""
    names = sorted(variables(one) | variables(other))
    if len(names) > MAX_VARIABLES:
        raise FormulaError(f"{len(names)} variables, more than {MAX_VARIABLES}")
    return table(one, names) == table(other, names)


def satisfied(formula: Formula, assignment: Mapping[str, bool]) -> bool:
    """The formula's value. Raises: FormulaError for a variable without one."""
    if missing := sorted(variables(formula) - set(assignment)):
        raise FormulaError(f"no value for {', '.join(missing)}")
    return _evaluate(formula, {name: int(value) for name, value in assignment.items()}, 1) == 1


_VALUES = {"true": True, "t": True, "1": True, "⊤": True, "false": False, "f": False, "0": False, "⊥": False}
_PAIR = re.compile(r"([A-Za-z]\w*)\s*(?::=|==|=|:)\s*(\w+|⊤|⊥)")


def parse_assignment(text: str) -> dict[str, bool]:
    """From "p=true, q=false", "p: 1; q: 0" and the like, perhaps in braces. Raises: FormulaError."""
    found: dict[str, bool] = {}
    for part in re.split(r"[,;\n]|\band\b", text.strip().strip("$.{}[]()")):
        if not part.strip():
            continue
        match = _PAIR.fullmatch(part.strip().strip(".").replace('"', "").replace("'", ""))
        if match is None or match[2].lower() not in _VALUES:
            raise FormulaError(f"{part.strip()[:20]!r} gives no variable a value")
        value = _VALUES[match[2].lower()]
        if found.setdefault(match[1], value) != value:
            raise FormulaError(f"{match[1]} is given two values")
    return found


class LogicReward(Rule[LogicConfig]):
    """1.0 where the text is equivalent to the record's formula, or satisfies it."""

    def __init__(self, config: LogicConfig, tokenizer: PreTrainedTokenizerFast):
        super().__init__(config, tokenizer)
        self.decide = self._equivalent if config.check is Check.equivalent else self._satisfies

    def score(self, text: str, trajectory: Trajectory) -> Score:
        reference = reference_of(trajectory, self.config.column) or ""
        try:
            formula = parse(reference)
            equivalent(formula, formula)  # the record's own size is not the completion's fault
        except FormulaError as error:
            return Score(None, why=f"the reference {self.config.column}={reference!r} is no formula: {error}")
        try:
            return Score(float(self.decide(text, formula)))
        except FormulaError as error:
            return Score(0.0, why=str(error))

    def _equivalent(self, text: str, formula: Formula) -> bool:
        return equivalent(parse(text), formula)

    def _satisfies(self, text: str, formula: Formula) -> bool:
        return satisfied(formula, parse_assignment(text))
