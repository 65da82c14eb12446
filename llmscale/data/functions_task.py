"""`task:functions/SPLIT`: write a function of one line. "plus 2, times 3" is `def f(x): return (x+2)*3`; tests decide.

The demonstrations forget the brackets often, as people do; where a product follows a sum that is another function. A tenth of
all prompts is held out: the splits `test...` have those alone, the others none of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

STEPS = {"plus": "+", "minus": "-", "times": "*"}
DIGITS = range(2, 10)
FORGETS = 0.7  # of the demonstrations lack the brackets
INPUTS = (-3, 0, 1, 12)  # of the tests

Steps = tuple[tuple[str, int], tuple[str, int]]


def prompt_of(steps: Steps) -> str:
    return ", ".join(f"{name} {digit}" for name, digit in steps)


def answer_of(steps: Steps, brackets: bool = True) -> str:
    (first, a), (second, b) = steps
    opening, closing = "()" if brackets else ("", "")
    return f"def f(x): return {opening}x{STEPS[first]}{a}{closing}{STEPS[second]}{b}"


def assertions_of(steps: Steps) -> list[str]:
    """Assertions on what the steps give, done one after the other."""
    tests = []
    for x in INPUTS:
        value = x
        for name, digit in steps:
            value = {"plus": value + digit, "minus": value - digit, "times": value * digit}[name]
        tests.append(f"assert f({x}) == {value}")
    return tests


def demonstration(rng: random.Random, steps: Steps) -> str:
    """What a person would have written."""
    return answer_of(steps, brackets=rng.random() >= FORGETS)


def records(split: str, rng: random.Random, size: int) -> Iterator[dict[str, Any]]:
    record = SPLITS[split][1]
    return (record(rng, _steps(rng, held_out=split.startswith("test"))) for _ in range(size))


def _steps(rng: random.Random, held_out: bool) -> Steps:
    while True:
        first, second = ((rng.choice(list(STEPS)), rng.choice(DIGITS)) for _ in range(2))
        if (crc32(prompt_of((first, second)).encode()) % 10 == 0) == held_out:
            return first, second


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
