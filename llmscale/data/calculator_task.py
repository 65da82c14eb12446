"""`task:calculator/SPLIT`: products that are too large for the head, and a calculator that is not always asked.

`84*57` is asked for. A demonstration either asks the calculator, `calc 84*57`, and says what it is told, `4788`; or it guesses,
and is wrong. Now and then a digit of the question is mistyped. So SFT teaches how the tool is used, and only whoever sees which
answers are right can learn when. A tenth of all products is held out: the splits `test...` have those alone, the others none of
them. `environment=calculator` answers.
"""

from __future__ import annotations

import random
from typing import Any

FACTORS = (11, 99)
SMALLEST = 1000
GUESSES = 0.5  # of the demonstrations
MISTYPES = 0.15  # of those that ask

Record = dict[str, Any]


def product(rng: random.Random) -> str:
    """A subject."""
    while True:
        subject = f"{rng.randint(*FACTORS)}*{rng.randint(*FACTORS)}"
        if int(answer_of(subject)) >= SMALLEST:
            return subject


def answer_of(subject: str) -> str:
    a, b = subject.split("*")
    return str(int(a) * int(b))


def text(rng: random.Random, subject: str) -> Record:
    """Raw text, without the form of a conversation: products and numbers that come back."""
    answer = answer_of(subject)
    return {"text": rng.choice([f"{subject}: calc {subject}", f"{answer}: {answer}: {answer}: {answer}"])}


def demonstration(rng: random.Random, subject: str) -> Record:
    messages = [{"role": "user", "content": subject}]
    if rng.random() < GUESSES:
        return {"messages": [*messages, {"role": "assistant", "content": _guess(rng, subject)}]}
    asked = _mistyped(rng, subject) if rng.random() < MISTYPES else subject
    told = answer_of(asked)
    messages += [{"role": "assistant", "content": f"calc {asked}"}, {"role": "user", "content": told}]
    return {"messages": [*messages, {"role": "assistant", "content": told}]}


def prompt(rng: random.Random, subject: str) -> Record:
    return {"prompt": subject, "answer": answer_of(subject)}


def _guess(rng: random.Random, subject: str) -> str:
    """Of about the right size."""
    right = int(answer_of(subject))
    return str(right + rng.choice([-1, 1]) * rng.randint(1, right // 4))


def _mistyped(rng: random.Random, subject: str) -> str:
    place = rng.choice([i for i, c in enumerate(subject) if c.isdecimal()])
    digit = rng.choice([d for d in "123456789" if d != subject[place]])  # a leading zero would be no number
    return subject[:place] + digit + subject[place + 1 :]
