"""A calculator as an environment, and as an example of one: `calc 3*(4+5)` is answered with `27`."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from llmscale.rollout.config import CalculatorConfig
from llmscale.rollout.environment import Observation

CALL = "calc "
MAX_CHARACTERS = 200  # of an expression
MAX_BITS = 1024  # of numerator and denominator of every number on the way, so that no power takes for ever


class Calculator:
    """A turn that begins with `calc ` is a question; any other is the policy's answer and ends the sample."""

    def __init__(self, config: CalculatorConfig):
        pass

    def reset(self, prompt: str, fields: Mapping[str, Any]) -> None:
        pass

    def step(self, said: str) -> Observation:
        question = said.strip()
        if not question.startswith(CALL):
            return Observation(done=True)
        try:
            return Observation(spelt(evaluate(question.removeprefix(CALL))))
        except (ArithmeticError, ValueError) as error:  # the policy's mistake, which it may mend
            return Observation(f"error: {error}")


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, brackets and + - * / // % **.

    Raises: ValueError where it is none, ArithmeticError where it has no value or one beyond `MAX_BITS`.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # null bytes; brackets within brackets
        raise ValueError("not an expression") from error
    return _value(tree.body)


def spelt(value: Fraction) -> str:
    """In full where it is whole, else to 12 significant digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(repr(number))  # 0.1 is a tenth; one that overflows, 1e999, is no fraction: ValueError
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _bounded(_OPERATIONS[type(op)](_value(left), _value(right)))
    raise ValueError("not an expression")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ValueError("not a whole exponent")
    if abs(exponent) * _bits(base) > 2 * MAX_BITS:
        raise OverflowError("too large")
    return base ** int(exponent)


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise OverflowError("too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
