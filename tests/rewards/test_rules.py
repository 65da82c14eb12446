"""Which number an answer gives, and when it is the right one."""

from __future__ import annotations

import pytest

from llmscale.rewards.config import AnswerConfig, Match
from llmscale.rewards.rules import AnswerReward, final_number
from tests.tiny import tokenizer, trajectory


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("3 apples and 4 pears make 7", "7"),
        ("1,234,567 people", "1234567"),
        ("$1,000.50", "1000.5"),
        ("2.500", "2.5"),
        ("10.0", "10"),
        ("100", "100"),
        ("-5", "-5"),
        ("x = -0.50", "-0.5"),
        ("8-3", "3"),  # a sign that joins two numbers is no sign
        ("from 3-5", "5"),
        ("#### 18", "18"),
        ("1, 2, 3", "3"),  # a list, not thousands
        ("12,34", "34"),
        ("in 1999, it was", "1999"),
        ("50%", "50"),
        ("(7)", "7"),
        ("x2", None),  # part of a word
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None):
    assert final_number(text) == number


def reward(match: Match, completion: str, answer: object) -> float:
    sample = trajectory([1, 2], [0, 1], completion=completion, answer=answer)
    return AnswerReward(AnswerConfig(match=match), tokenizer())([sample])[0]


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("It is 1,200.", "1200", 1.0),
        ("It is 12.0", 12, 1.0),
        ("9 + 3 = 12", "9 + 3 = <<9+3=12>>12\n#### 12", 1.0),
        ("12 or 13", "12", 0.0),
        ("-12", "12", 0.0),
        ("twelve", "12", 0.0),
        ("twelve", "a dozen", 0.0),  # no number on either side is not a match
    ],
)
def test_number(completion: str, answer: object, right: float):
    assert reward(Match.number, completion, answer) == right


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (" Paris\n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("Paris.", "Paris", 0.0),
        ("12", 12, 1.0),
        ("12.0", "12", 0.0),
    ],
)
def test_exact(completion: str, answer: object, right: float):
    assert reward(Match.exact, completion, answer) == right
