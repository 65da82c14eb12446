"""The calculator: right, exact, and impossible to keep busy."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest

from llmscale.rollout.calculator import MAX_CHARACTERS, Calculator, evaluate, spelt
from llmscale.rollout.config import CalculatorConfig
from llmscale.rollout.environment import Observation


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("23*45+67", "1102"),
        ("67-23*45", "-968"),
        (" (2 + 3) * -4 ", "-20"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("1/3*3", "1"),
        ("7//2", "3"),
        ("-7%3", "2"),
        ("2**-2", "0.25"),
        ("2**100", str(2**100)),
        ("1e3", "1000"),
        ("+5", "5"),
    ],
)
def test_works_out(expression: str, value: str):
    assert spelt(evaluate(expression)) == value


def test_is_exact():
    assert evaluate("(1/3+1/6)*2") == 1 and evaluate("0.1*3") == Fraction(3, 10)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "",
            "2+",
            "a",
            "__import__('os').getcwd()",
            "print(1)",
            "[1][0]",
            "1 if 1 else 2",
            "1<2",
            "True",
            "1j",
            "'a'*3",
        ),
        *("1;2", "x:=3", "lambda: 1", "2 3", "1\x002", "9" * (MAX_CHARACTERS + 1), "(" * 150, "~1", "1&1", "1e999"),
    ],
)
def test_refuses_what_is_no_sum(expression: str):
    with pytest.raises(ValueError):
        evaluate(expression)


@pytest.mark.parametrize("expression", ["1/0", "5%0", "0**-1", "9**9**9", "9**999", "2**1024", "(1/9)**999**9"])
def test_refuses_what_has_no_value_or_too_large_a_one_at_once(expression: str):
    started = time.perf_counter()
    with pytest.raises(ArithmeticError):
        evaluate(expression)
    assert time.perf_counter() - started < 0.5


def test_as_an_environment():
    calculator = Calculator(CalculatorConfig())
    calculator.reset("what is 3 times 9?", {})
    assert calculator.step("calc 3*9\n") == Observation("27", done=False)
    assert calculator.step("calc 3*") == Observation("error: not an expression")
    assert calculator.step("calc 1/0").text.startswith("error: ")
    assert calculator.step("27") == Observation(done=True)
