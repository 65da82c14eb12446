"""The task of adding a few numbers step by step: 5+4+2 is `5+4=9`, `9+2=11`, a line each, and the last line ends in the sum.

The demonstrations miscalculate now and then and may stop too early. The splits `...solutions` have attempts whose steps are
labelled: a step is right when it goes on from the line before with the next number, adds the two rightly, and neither stops
before the sum is done nor goes on behind it. So a solution is right when all of its steps are. A subject is a sum, `5+4+2`.
"""

from __future__ import annotations

import random
from typing import Any

MISCALCULATES = 0.15  # of the steps of a demonstration
STOPS = 0.1  # of the demonstrations, before the last step
SPOILED = 0.25  # of the steps of an attempt that is judged
NUM_TERMS = (3, 5)
LARGEST = 5  # term

Record = dict[str, Any]


def sum_of(rng: random.Random) -> str:
    return "+".join(str(rng.randint(1, LARGEST)) for _ in range(rng.randint(*NUM_TERMS)))


def terms_of(subject: str) -> list[int]:
    return [int(term) for term in subject.split("+")]


def prompt_of(subject: str) -> str:
    return f"add {subject}"


def steps_of(subject: str) -> list[str]:
    """The right solution."""
    first, *rest = terms_of(subject)
    steps = []
    for term in rest:
        steps.append(f"{first}+{term}={first + term}")
        first += term
    return steps


def right_steps(subject: str, steps: list[str]) -> list[bool]:
    """Whether each step is right, given the lines before it."""
    first, *rest = terms_of(subject)
    labels = []
    for i, step in enumerate(steps):
        is_last = i == len(steps) - 1
        expected = f"{first}+{rest[i]}={first + rest[i]}" if i < len(rest) else None
        labels.append(step == expected and is_last == (i == len(rest) - 1))
        result = step.rpartition("=")[2]
        first = int(result) if result.isdecimal() else first
    return labels


def attempt(rng: random.Random, subject: str, miscalculates: float, stops: float) -> list[str]:
    """Steps of someone who errs; what is wrong is carried on."""
    first, *rest = terms_of(subject)
    steps = []
    for term in rest:
        result = first + term
        if rng.random() < miscalculates:
            result = max(0, result + rng.choice([-10, -2, -1, 1, 2, 10]))
        steps.append(f"{first}+{term}={result}")
        first = result
    return steps[:-1] if rng.random() < stops else steps


def text(rng: random.Random, subject: str) -> Record:
    """Raw text of sums, without the form of a conversation."""
    return {"text": "\n".join([f"add {subject}", *steps_of(subject)])}


def demonstration(rng: random.Random, subject: str) -> Record:
    return {"prompt": prompt_of(subject), "completion": "\n".join(attempt(rng, subject, MISCALCULATES, STOPS))}


def solution(rng: random.Random, subject: str) -> Record:
    steps = attempt(rng, subject, SPOILED, STOPS)
    if rng.random() < STOPS:  # once more than there is to add
        steps.append(f"{steps[-1].rpartition('=')[2]}+{rng.randint(1, LARGEST)}={rng.randint(3, 25)}")
    return {"prompt": prompt_of(subject), "steps": steps, "labels": right_steps(subject, steps)}


def prompt(rng: random.Random, subject: str) -> Record:
    return {"prompt": prompt_of(subject), "answer": str(sum(terms_of(subject)))}
