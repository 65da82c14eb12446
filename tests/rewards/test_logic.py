"""Propositional formulas: read, and decided like a loop over all assignments decides them."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping

import pytest

from llmscale.protocols import Score
from llmscale.rewards.config import Check, LogicConfig
from llmscale.rewards.logic import FormulaError, equivalent, parse, parse_assignment, satisfied, table, variables
from llmscale.rewards.weighted import build_reward
from tests.tiny import tokenizer, trajectory

Meaning = Callable[[Mapping[str, bool]], bool]
SIGNS = {
    "and": ["&", "/\\", "∧", "and", "\\land"],
    "or": ["|", "||", "∨", "OR", "\\vee"],
    "xor": ["^", "xor", "⊕"],
    "implies": ["->", "=>", "→", "\\to"],
    "iff": ["<->", "↔", "iff", "\\iff"],
    "not": ["!", "~", "¬", "not ", "\\neg "],
}


def formula(rng: random.Random, depth: int) -> tuple[str, Meaning]:
    """A random formula with every bracket, and what it means."""
    kind = rng.choice(list(SIGNS)) if depth else "name"
    if kind == "name":
        name = rng.choice("pqrs")
        return name, lambda v: v[name]
    sign, (text, one) = rng.choice(SIGNS[kind]), formula(rng, depth - 1)
    if kind == "not":
        return f"{sign}({text})", lambda v: not one(v)
    other_text, other = formula(rng, rng.randrange(depth))
    means: dict[str, Meaning] = {
        "and": lambda v: one(v) and other(v),
        "or": lambda v: one(v) or other(v),
        "xor": lambda v: one(v) != other(v),
        "implies": lambda v: not one(v) or other(v),
        "iff": lambda v: one(v) == other(v),
    }
    return f"({text}) {sign} ({other_text})", means[kind]


def assignments() -> list[dict[str, bool]]:
    return [dict(zip("pqrs", values, strict=True)) for values in itertools.product([False, True], repeat=4)]


def test_like_a_loop_over_all_assignments():
    rng = random.Random(0)
    equal = 0
    for _ in range(300):
        (text, means), (other, other_means) = formula(rng, 3), formula(rng, 2)
        parsed = parse(text)
        assert variables(parsed) <= set("pqrs")
        for values in assignments():
            assert satisfied(parsed, values) == means(values)
        same = all(means(v) == other_means(v) for v in assignments())
        assert equivalent(parsed, parse(other)) == same
        equal += same
        bits = [means(dict(zip("pqrs", (k >> i & 1 == 1 for i in range(4)), strict=True))) for k in range(16)]
        assert table(parsed, list("pqrs")) == sum(bit << k for k, bit in enumerate(bits))
    assert 0 < equal < 300


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("not p and q", "(not p) and q"),
        ("p or q and r", "p or (q and r)"),
        ("p or q xor r", "p or (q xor r)"),
        ("p xor q and r", "p xor (q and r)"),
        ("p -> q or r", "p -> (q or r)"),
        ("p -> q -> r", "p -> (q -> r)"),
        ("p <-> q -> r", "p <-> (q -> r)"),
        ("p <-> q <-> r", "(p <-> q) <-> r"),
        ("~~p", "p"),
        ("[p & (q | r)]", "p & q | p & r"),
        ("$p \\to q$.", "¬q → ¬p"),
        ("p | true", "1"),
        ("p & 0", "⊥"),
        ("p + !p", "q || not q"),
    ],
)
def test_binding_and_spelling(one: str, other: str):
    assert equivalent(parse(one), parse(other))


@pytest.mark.parametrize("text", ["p", "p -> q", "p <-> (q <-> r)", "(p -> q) -> r"])
def test_different_formulas_are_different(text: str):
    assert not equivalent(parse(text), parse("p -> (q -> r)"))


@pytest.mark.parametrize(
    "text",
    ["", "p q", "p &", "& p", "(p", "p)", "()", "p @ q", "p & 2", "1x", "import os", "__import__('os')", "p.q", "\\foo", "p, q",
     "not", "p -> ", "(" * 3000 + "p", "~" * 200 + "p", "p->" * 500 + "p", "p & " * 5000 + "p"],
)  # fmt: skip
def test_what_is_no_formula(text: str):
    with pytest.raises(FormulaError):
        parse(text)


def test_sixteen_variables_and_no_more():
    started = time.process_time()
    many = parse(" & ".join(f"x{i}" for i in range(16)))
    assert equivalent(many, parse("~(" + " | ".join(f"~x{i}" for i in range(16)) + ")"))
    assert time.process_time() - started < 1
    with pytest.raises(FormulaError, match="17 variables"):
        equivalent(many, parse("y"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("p=true, q = False", {"p": True, "q": False}),
        ("p: 1; q: 0.", {"p": True, "q": False}),
        ("{'p': T, \"q\": F}", {"p": True, "q": False}),
        ("p := true and q := false", {"p": True, "q": False}),
        ("p = true\nq = false\n", {"p": True, "q": False}),
        ("", {}),
        ("p", None),
        ("p=maybe", None),
        ("p=true, p=false", None),
        ("p=true, p=true", {"p": True}),
    ],
)
def test_assignments(text: str, found: dict[str, bool] | None):
    if found is None:
        with pytest.raises(FormulaError):
            parse_assignment(text)
    else:
        assert parse_assignment(text) == found


def score(check: Check, text: str, formula: str | None) -> Score:
    reward = build_reward(LogicConfig(check=check), tokenizer(), "reward")
    return reward([trajectory([1, 2], [0, 1], completion=text, formula=formula)])[0]


@pytest.mark.parametrize(
    ("check", "text", "value"),
    [
        (Check.equivalent, "!p | q", 1.0),
        (Check.equivalent, "p & q", 0.0),
        (Check.equivalent, "I think p", 0.0),
        (Check.equivalent, " & ".join(f"x{i}" for i in range(20)), 0.0),
        (Check.satisfies, "p=true, q=true", 1.0),
        (Check.satisfies, "p=true, q=false", 0.0),
        (Check.satisfies, "q=true", 0.0),  # says nothing of p
        (Check.satisfies, "p=true, q=true, z=false", 1.0),
    ],
)
def test_the_reward(check: Check, text: str, value: float):
    assert score(check, text, "p -> q").value == value


@pytest.mark.parametrize("formula", ["p q", "", None, " & ".join(f"x{i}" for i in range(17))])
def test_a_reference_that_is_no_formula_is_no_score(formula: str | None):
    found = score(Check.equivalent, "p", formula)
    assert found.value is None and "reference" in found.why
