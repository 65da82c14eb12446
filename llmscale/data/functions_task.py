"""`task:functions/SPLIT`: write a function of one line. "increment, double, square" is `def f(x): return ((x+1)*2)**2`, and
tests decide.

The demonstrations forget the brackets often, as people do; `x+1*2**2` is another function. A tenth of all prompts is held out:
the splits `test...` have those alone, the others none of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

STEPS: dict[str, tuple[str, Callable[[int], int]]] = {  # word -> as code, what it does
    "double": ("*2", lambda x: x * 2),
    "triple": ("*3", lambda x: x * 3),
    "square": ("**2", lambda x: x**2),
    "quadruple": ("*4", lambda x: x * 4),
    "increment": ("+1", lambda x: x + 1),
    "decrement": ("-1", lambda x: x - 1),
    "halve": ("//2", lambda x: x // 2),
    "last digit": ("%10", lambda x: x % 10),
}
PROGRAMS = [", ".join(steps) for steps in product(STEPS, repeat=3)]
FORGETS = 0.7  # of the demonstrations lack the brackets
INPUTS = (-3, 0, 1, 12)  # of the tests


def program(rng: random.Random) -> str:
    """A prompt."""
    return rng.choice(PROGRAMS)


def answer_of(prompt: str, brackets: bool = True) -> str:
    code = "x"
    for number, step in enumerate(prompt.split(", ")):
        code = (f"({code})" if brackets and number else code) + STEPS[step][0]
    return f"def f(x): return {code}"


def assertions_of(prompt: str) -> list[str]:
    """What the steps give, done one after the other."""
    tests = []
    for x in INPUTS:
        value = x
        for step in prompt.split(", "):
            value = STEPS[step][1](value)
        tests.append(f"assert f({x}) == {value}")
    return tests


def text(rng: random.Random, prompt: str) -> dict[str, Any]:
    return {"text": f"{prompt}: {answer_of(prompt)}"}


def demonstration(rng: random.Random, prompt: str) -> dict[str, Any]:
    """What a person would have written."""
    return {"prompt": prompt, "completion": answer_of(prompt, brackets=rng.random() >= FORGETS)}


def prompt(rng: random.Random, prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "tests": assertions_of(prompt)}
