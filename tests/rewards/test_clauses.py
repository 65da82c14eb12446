"""Numbered clauses: what is in order, and each way not to be."""

from __future__ import annotations

import random

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.rewards.clauses import clause_faults
from llmscale.rewards.config import ClausesConfig
from llmscale.rewards.weighted import build_reward
from tests.tiny import tokenizer, trajectory

LEASE = """1. The tenant shall
  (a) pay the rent,
  (b) keep the house
      (i) clean, and
      (ii) in repair as clause 2 has it.
2. (a) What paragraph (b) leaves out is the landlord's, subject to clause 1(b)(ii).
  (b) Section 11 of the Housing Act 1985 remains.
3. This lease ends as clauses 1 and 2 say."""


@pytest.mark.parametrize(
    ("text", "clauses", "references", "faults"),
    [
        (LEASE, 9, 5, []),
        ("no clause at all", 0, 0, []),
        ("1. One.\n3. Two.", 2, 0, ["line 2: 3. is number 3 of its level, 2 should follow"]),
        ("2. Two.", 1, 0, ["line 1: 2. is number 2 of its level, 1 should follow"]),
        ("1. One.\n1. Again.", 2, 0, ["line 2: 1. is number 1 of its level, 2 should follow"]),
        ("1. One.\n (b) x", 2, 0, ["line 2: (b) is number 2 of its level, 1 should follow"]),
        ("1. One\n(a) x\n2. Two\n(b) y", 4, 0, ["line 4: (b) is number 2 of its level, 1 should follow"]),
        ("(a) x", 1, 0, ["line 1: (a) skips a level"]),
        ("1.\n2. Two.", 2, 0, ["line 1: 1. is empty"]),
        ("1. One.\n2.", 2, 0, ["line 2: 2. is empty"]),
        ("1.\n (a) only below", 2, 0, []),
        ("1. See clause 4.", 1, 1, ["line 1: 1. refers to 4, which is not there"]),
        ("1. See clause 1(a).", 1, 1, ["line 1: 1. refers to 1(a), which is not there"]),
        ("1. See paragraph (a).", 1, 1, ["line 1: 1. refers to (a), which is not there"]),
        ("1. Clause 9, clause 9, clause 9.", 1, 1, ["line 1: 1. refers to 9, which is not there"]),
        ("1. See section 5 of the Act, clause 1 of this lease.", 1, 1, []),
        ("1. It costs\n1.5 million in 2023.", 1, 0, []),
    ],
)
def test_faults(text: str, clauses: int, references: int, faults: list[str]):
    assert clause_faults(text, ["1.", "(a)", "(i)"]) == (clauses, references, faults)


def test_i_is_a_letter_or_a_number_as_what_follows_says():
    letters = "1. x\n" + "\n".join(f"({c}) x" for c in "abcdefghijklm")
    both = "1. x\n" + "\n".join(f"({c}) x" for c in [*"abcdefgh", "i", "ii", "iii", "iv", "v", "i", "j"])
    assert clause_faults(letters, ["1.", "(a)", "(i)"])[2] == []
    assert clause_faults(both, ["1.", "(a)", "(i)"])[2] == []


@pytest.mark.parametrize(
    ("levels", "text", "faults"),
    [
        ("1. 1.1 1.1.1", "1. x\n1.1 y\n1.1.1 z\n1.2. w, clause 1.1.1\n2. v", 0),
        ("1. 1.1", "1. x\n1.1 y\n2. z\n1.2 w", 1),
        ("A. 1)", "A. x\n1) y\n2) z\nB. w", 0),
        ("I. (A) (1)", "I. x\n(A) y\n(1) z\n(2) w\nII. v\nIII. u\nIV. t", 0),
        ("(a)", "\n".join(f"({c}) x" for c in [*"abcdefghijklmnopqrstuvwxyz", "aa", "bb"]), 0),
    ],
)
def test_other_numberings(levels: str, text: str, faults: int):
    assert len(clause_faults(text, levels.split())[2]) == faults


def document(rng: random.Random) -> list[str]:
    """A sound document of three levels, and words that no rule is about."""
    lines = []
    for one in range(1, rng.randint(2, 6)):
        lines.append(f"{one}. words")
        for two in range(rng.randint(0, 12)):
            lines.append(f" ({chr(97 + two)}) words, subject to clause {rng.randint(1, one)}")
            roman = ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x"]
            lines += [f"  ({r}) words" for r in roman[: rng.choice([0, 0, 2, 10])]]
    return lines


def test_what_is_sound_is_found_sound_and_one_clause_less_is_not():
    rng = random.Random(0)
    broken = 0
    for _ in range(150):
        lines = document(rng)
        assert clause_faults("\n".join(lines), ["1.", "(a)", "(i)"])[2] == [], lines
        i = rng.randrange(len(lines))
        following = [line.index(line.strip()[0]) for line in lines[i + 1 :]]
        own = lines[i].index(lines[i].strip()[0])
        if (
            own in following and min(following[: following.index(own)], default=9) >= own
        ):  # another of its level follows
            broken += 1
            assert clause_faults("\n".join(lines[:i] + lines[i + 1 :]), ["1.", "(a)", "(i)"])[2], (lines, i)
    assert broken > 50


def score(text: str, **settings: object) -> float | None:
    reward = build_reward(ClausesConfig(**settings), tokenizer(), "reward")
    return reward([trajectory([1, 2], [0, 1], completion=text)])[0].value


def test_the_score_is_the_share_without_fault():
    assert score(LEASE) == 1.0
    assert score("1. One.\n3. See clause 7.") == pytest.approx(1 - 2 / 3)
    assert score("2. See clause 7.") == 0.0
    assert score("words") == 0.0
    assert score(LEASE, min_clauses=10) == 0.0


@pytest.mark.parametrize("levels", ["", "x", "1. x", "(a) (a)", "(a) 1.1", "1. 1.1.1", "1.0", "1. (b)"])
def test_numberings_that_are_none_are_refused(levels: str):
    with pytest.raises(ConfigError) as caught:
        check(ClausesConfig(levels=levels))
    assert caught.value.where == "levels"
