"""`task:functions/SPLIT`: write a function of one line. "increment, double, square" is `def f(x): return ((x+1)*2)**2`, and
tests decide.

The demonstrations forget the brackets often, as people do; `x+1*2**2` is another function. A tenth of all prompts is held out:
the splits `test...` have those alone, the others none of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any
from zlib import crc32

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
PROGRAMS = list(product(STEPS, repeat=3))
FORGETS = 0.7  # of the demonstrations lack the brackets
INPUTS = (-3, 0, 1, 12)  # of the tests

Steps = tuple[str, ...]


def prompt_of(steps: Steps) -> str:
    return ", ".join(steps)


def answer_of(steps: Steps, brackets: bool = True) -> str:
    code = "x"
    for number, step in enumerate(steps):
        code = (f"({code})" if brackets and number else code) + STEPS[step][0]
    return f"def f(x): return {code}"


def assertions_of(steps: Steps) -> list[str]:
    """What the steps give, done one after the other."""
    tests = []
    for x in INPUTS:
        value = x
        for step in steps:
            value = STEPS[step][1](value)
        tests.append(f"assert f({x}) == {value}")
    return tests


def demonstration(rng: random.Random, steps: Steps) -> str:
    """What a person would have written."""
    return answer_of(steps, brackets=rng.random() >= FORGETS)


def records(split: str, rng: random.Random, size: int) -> Iterator[dict[str, Any]]:
    held_out = split.startswith("test")
    programs = [p for p in PROGRAMS if (crc32(prompt_of(p).encode()) % 10 == 0) == held_out]
    return (SPLITS[split][1](rng, rng.choice(programs)) for _ in range(size))


def _text(rng: random.Random, steps: Steps) -> dict[str, Any]:
    return {"text": f"{prompt_of(steps)}: {answer_of(steps)}"}


def _pair(rng: random.Random, steps: Steps) -> dict[str, Any]:
    return {"prompt": prompt_of(steps), "completion": demonstration(rng, steps)}


def _prompt(rng: random.Random, steps: Steps) -> dict[str, Any]:
    return {"prompt": prompt_of(steps), "tests": assertions_of(steps)}


SPLITS: dict[
    str, tuple[int, Callable[[random.Random, Steps], dict[str, Any]]]
] = {  # records where the source does not say
    "pretrain": (20_000, _text),
    "sft": (4_000, _pair),
    "prompts": (4_000, _prompt),
    "test": (256, _prompt),
    "test-sft": (256, _pair),
}
