"""distinct-n against the loop of its definition."""

from __future__ import annotations

import random

import pytest

from llmscale.rewards.diversity import distinct, diversity_metrics
from tests.tiny import trajectory


def test_like_the_loop():
    rng = random.Random(0)
    for _ in range(100):
        texts = [[rng.randrange(4) for _ in range(rng.randrange(6))] for _ in range(rng.randrange(5))]
        for n in (1, 2, 3):
            seen, total = set(), 0
            for text in texts:
                for i in range(len(text)):
                    if i + n <= len(text):
                        seen.add(str(text[i : i + n]))
                        total += 1
            assert distinct(texts, n) == pytest.approx(len(seen) / total if total else 0.0, abs=1e-9)


def test_of_the_policys_own_tokens_within_a_turn():
    prompt, tool = 9, 8
    one = trajectory([prompt, 1, 2, tool, 1, 2], [0, 1, 1, 0, 1, 1])
    other = trajectory([prompt, 1, 3], [0, 1, 1])
    assert diversity_metrics([one, other]) == {
        "diversity/distinct_1": pytest.approx(3 / 6),  # 1 2 1 2 1 3
        "diversity/distinct_2": pytest.approx(2 / 3),  # 12 12 13, and no 21 over the tool's token
    }


def test_the_same_again_and_again_is_less_and_less_diverse():
    assert [distinct([[1, 2, 3]] * k, 2) for k in (1, 2, 4)] == [1.0, 0.5, 0.25]
    assert diversity_metrics([]) == {"diversity/distinct_1": 0.0, "diversity/distinct_2": 0.0}
