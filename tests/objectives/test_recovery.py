"""A reward model finds the scores behind noisy choices (Bradley and Terry 1952): a real training, of a model of two layers."""

from __future__ import annotations

import numpy as np
import pytest

from llmscale.batch import RankedExample
from llmscale.engine.config import SingleConfig
from llmscale.engine.single import SingleEngine
from llmscale.objectives.calibration import calibration
from llmscale.objectives.config import RankingConfig
from llmscale.objectives.ranking import Ranking
from llmscale.optim.config import OptimConfig
from tests.tiny import VOCAB_SIZE, scalar_model

NUM_STEPS, PAIRS_PER_STEP, NUM_TOKENS = 200, 64, 6


def true_scores(sequences: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """What a completion is worth: the sum of what its tokens are worth."""
    return worth[sequences].sum(-1)


def choices(rng: np.random.Generator, worth: np.ndarray, num: int) -> list[RankedExample]:
    """Pairs of random completions; the first is preferred with probability sigmoid(s_1 - s_2)."""
    pairs = rng.integers(0, VOCAB_SIZE, (num, 2, NUM_TOKENS))
    scores = true_scores(pairs, worth)
    first = rng.random(num) < 1 / (1 + np.exp(scores[:, 1] - scores[:, 0]))
    return [RankedExample(tuple(pair), (1, 2) if won else (2, 1)) for pair, won in zip(pairs, first, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_score_differences_are_recovered_from_choices(seed: int):
    rng = np.random.default_rng(seed)
    worth = rng.normal(0, 0.7, VOCAB_SIZE)
    model, objective = scalar_model(seed), Ranking(RankingConfig())
    engine = SingleEngine(SingleConfig(), model, OptimConfig(lr=5e-3, warmup_steps=10, weight_decay=0.0), NUM_STEPS)
    for _ in range(NUM_STEPS):
        engine.step([objective.prepare(choices(rng, worth, PAIRS_PER_STEP))], objective)

    held_out = objective.prepare(choices(rng, worth, 1000))
    (output,) = engine.forward([held_out], lambda f, b: {"scores": objective.scores(f(b), b)})
    found = output["scores"].numpy().reshape(-1, 2)
    sequences = held_out["input_ids"].numpy().reshape(-1, 2, NUM_TOKENS)
    known = true_scores(sequences, worth)
    differences = (found[:, 0] - found[:, 1], known[:, 0] - known[:, 1])
    assert np.corrcoef(*differences)[0, 1] > 0.95
    assert np.polyfit(differences[1], differences[0], 1)[0] == pytest.approx(
        1, abs=0.25
    )  # the scale too, not the order alone
    evidence = np.where(held_out["ranks"].reshape(-1, 2)[:, 0] == 1, differences[0], -differences[0])
    assert calibration(evidence).ece < 0.06
