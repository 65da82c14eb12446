"""Which samples are learned from, and that leaving some out biases nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from llmscale.batch import Trajectory
from llmscale.errors import NumericsError
from llmscale.protocols import Score
from llmscale.rl.admission import (
    Excluded,
    admitted,
    check_finite,
    check_some_left,
    reward_metrics,
    true_metrics,
    unscored,
    without_nonfinite,
)
from tests.tiny import trajectory

NAN, INF = math.nan, math.inf


def samples(draws: int, group: int) -> list[Trajectory]:
    pairs = itertools.product(range(draws), range(group))
    return [trajectory([1, 2], [0, 1], draw_id=10 + d, sample_index=k, completion=f"{d}.{k}") for d, k in pairs]


def scores(*values: float | None) -> list[Score]:
    return [Score(v, why="it broke" if v is None else "") for v in values]


def test_a_sample_without_a_score_goes_alone_or_with_its_draw():
    trajectories, found = samples(3, 2), scores(1, None, 2, 3, None, None)
    assert admitted(trajectories, found, whole_draws=False) == [0, 2, 3]
    assert admitted(trajectories, found, whole_draws=True) == [2, 3]
    assert admitted(trajectories[:2], scores(0, 0), whole_draws=True) == [0, 1]
    assert unscored(trajectories, found) == [
        Excluded(10, 1, "it broke"),
        Excluded(12, 0, "it broke"),
        Excluded(12, 1, "it broke"),
    ]


def test_every_group_that_is_left_is_whole():
    rng = np.random.default_rng(0)
    trajectories = samples(8, 4)
    for _ in range(50):
        found = scores(*[None if rng.random() < 0.1 else rng.random() for _ in trajectories])
        kept = admitted(trajectories, found, whole_draws=True)
        assert [trajectories[i].sample_index for i in kept] == [0, 1, 2, 3] * (len(kept) // 4)
        lost = {t.draw_id for t, s in zip(trajectories, found, strict=True) if s.value is None}
        assert {trajectories[i].draw_id for i in kept} == {10 + d for d in range(8)} - lost


def test_nothing_left_stops_with_the_reasons():
    found = [Score(None, why="no answer"), Score(None, why="no answer"), Score(None, why="timed out"), Score(1.0)]
    with pytest.raises(NumericsError, match=r"3 of 4 samples could not be scored.*no answer; timed out"):
        check_some_left(len(admitted(samples(1, 4), found, whole_draws=True)), samples(1, 4), found)
    kept = admitted(samples(1, 4), found, whole_draws=False)
    check_some_left(len(kept), samples(1, 4), found)
    assert kept == [3]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_stops_the_run_or_is_no_score(value: float):
    trajectories = samples(2, 2)
    check_finite(trajectories, scores(0, -1e30, None, 1e30))
    found = scores(0, 1, 2, value)
    with pytest.raises(NumericsError, match=r"'1\.1'") as caught:
        check_finite(trajectories, found)
    assert caught.value.where == "draw 11, sample 1" and "on_nonfinite=drop" in str(caught.value.fix)
    dropped = without_nonfinite(found)
    assert dropped[:3] == found[:3] and dropped[3].value is None
    assert unscored(trajectories, dropped) == [Excluded(11, 1, f"its reward is {value}")]


def test_metrics():
    found = [
        Score(1.0, {"a": 1.0, "b": 4.0}),
        Score(2.0, {"a": 3.0, "b": NAN}),
        Score(None, {"a": 100.0}, "no"),
        Score(0.0, {"a": 5.0}),
    ]
    assert reward_metrics(found, num_kept=2) == {
        "reward/excluded": 1.0, "reward/excluded_with_group": 1.0, "reward/a": 3.0, "reward/b": 4.0
    }  # fmt: skip
    assert true_metrics([None, None]) == {}
    assert true_metrics(scores(1, None, 2, NAN)) == {"reward/true": 1.5, "reward/true_excluded": 2.0}
    assert true_metrics(scores(None)) == {"reward/true_excluded": 1.0}


# ---------------------------------------------------------------- what it does to the gradient


def gradient(logits: torch.Tensor, rewards: list[float | None], group: int, zero: bool) -> torch.Tensor:
    """Expected leave-one-out policy gradient over every group of completions, in float64; `zero` scores what fails 0."""
    logprobs = torch.log_softmax(logits, 0)
    total = torch.zeros((), dtype=torch.float64)
    for chosen in itertools.product(range(len(rewards)), repeat=group):
        weight = logprobs[list(chosen)].detach().sum().exp()
        found = [Score(0.0 if rewards[c] is None and zero else rewards[c]) for c in chosen]
        kept = admitted(samples(1, group), found, whole_draws=True)
        if not kept:
            continue
        assert kept == list(range(group))
        values = torch.tensor([s.value for s in found], dtype=torch.float64)
        advantages = values - (values.sum() - values) / (group - 1)  # against the mean of the others
        total = total + weight * (advantages * logprobs[list(chosen)]).sum()
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("group", [2, 3, 4])
def test_the_gradient_is_that_of_the_mean_reward_of_what_can_be_scored(group: int):
    """One completion always fails. What is left points exactly along the gradient of E[reward | scored]: neither towards the
    failing completion nor away from it for its own sake. A silent zero does not."""
    logits = torch.tensor([0.3, -0.5, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    rewards: list[float | None] = [1.0, 0.2, None, -0.4]
    scored = [i for i, r in enumerate(rewards) if r is not None]
    probs = torch.softmax(logits[scored], 0)
    mean = (probs * torch.tensor([r for r in rewards if r is not None], dtype=torch.float64)).sum()
    expected = torch.autograd.grad(mean, logits)[0]
    found = gradient(logits, rewards, group, zero=False)
    share = torch.softmax(logits, 0)[scored].sum().detach()
    torch.testing.assert_close(found, group * share**group * expected, rtol=0, atol=1e-9)
    assert abs(found[2]) < 1e-9 < 1e-2 < abs(gradient(logits, rewards, group, zero=True)[2])
