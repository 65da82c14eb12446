"""What goes from scored trajectories into an update: rewards per token, order of minibatches, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmscale.batch import Trajectory
from llmscale.errors import NumericsError
from llmscale.rl.config import Advantage, PolicyGradientConfig
from llmscale.rl.experience import (
    Scored,
    build_experience,
    check_on_policy,
    explained_variance,
    is_informative,
    logprob_difference,
    minibatches,
    overlong_penalty,
)
from llmscale.rl.objectives import FIELDS
from llmscale.rl.policy_gradient import PolicyGradient
from tests.rl.settings import ALGORITHMS, algorithm
from tests.tiny import trajectory

# Lambda and gamma 1, no whitening: a token's return is the sum of the rewards that follow it.
PLAIN = PolicyGradient(PolicyGradientConfig(lam=1.0, gamma=1.0, whiten_advantages=False), 8)
KL_COEF = 0.1


def experience_of(algorithm, trajectories, rewards, old, ref, values, kl_coef):
    rows = zip(trajectories, rewards, old, ref, values, strict=True)
    return build_experience(algorithm, [Scored(t, float(r), None, o, f, v) for t, r, o, f, v in rows], kl_coef)


@pytest.fixture
def trajectories() -> list[Trajectory]:
    return [
        trajectory([3, 4, 5, 6, 7], [0, 0, 1, 1, 1], draw_id=10),
        trajectory([3, 4, 5, 6, 7, 8, 9], [0, 1, 1, 0, 0, 1, 0], draw_id=11, finished=False),  # two turns
        trajectory([3, 4, 5], [0, 0, 1], draw_id=12),
    ]


def arrays(trajectories: list[Trajectory], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=len(t.token_ids)).astype(np.float32) for t in trajectories]


def test_reward_at_the_last_own_token_and_kl_on_every_one(trajectories):
    old, ref, values = (arrays(trajectories, seed) for seed in (1, 2, 3))
    scores = [1.0, -2.0, 0.5]
    experience, metrics = experience_of(PLAIN, trajectories, scores, old, ref, values, KL_COEF)
    kls = []
    for i, (t, e) in enumerate(zip(trajectories, experience, strict=True)):
        own = np.flatnonzero(t.loss_mask)
        rewards = np.zeros(len(t.token_ids))
        rewards[own] = -KL_COEF * (old[i] - ref[i])[own]
        rewards[own[-1]] += scores[i]
        kls.append((old[i] - ref[i])[own].sum())
        expected = np.where(t.loss_mask, rewards[::-1].cumsum()[::-1], 0)
        np.testing.assert_allclose(e.returns, expected, atol=1e-6)
        np.testing.assert_allclose(e.advantages, np.where(t.loss_mask, expected - values[i], 0), atol=1e-6)
        np.testing.assert_array_equal(e.old_logprobs, np.where(t.loss_mask, old[i], 0))
        np.testing.assert_array_equal(e.old_values, np.where(t.loss_mask, values[i], 0))
        np.testing.assert_array_equal(e.token_ids, t.token_ids)
    assert metrics["kl/ref"] == pytest.approx(np.mean(kls), abs=1e-6)
    assert metrics["reward/mean"] == pytest.approx(np.mean(scores)) and metrics["reward/std"] == pytest.approx(
        np.std(scores)
    )
    assert metrics["rollout/completion_len"] == pytest.approx(7 / 3)
    assert metrics["rollout/cut_off"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_stands_on_other_tokens_changes_nothing(trajectories, name: str):
    clean = [arrays(trajectories, seed) for seed in (1, 2, 3)]
    masks = [t.loss_mask for t in trajectories]
    dirty = [[np.where(m, row, np.nan) for m, row in zip(masks, part, strict=True)] for part in clean]
    trajectories = [replace(t, draw_id=10) for t in trajectories]  # one group
    other = [replace(t, rollout_logprobs=np.where(t.loss_mask, t.rollout_logprobs, np.nan)) for t in trajectories]
    method = algorithm(name, "algorithm.correction=truncated")
    first, metrics = experience_of(method, trajectories, [1, 2, 3], *clean, KL_COEF)
    second, same = experience_of(method, other, [1, 2, 3], *dirty, KL_COEF)
    assert metrics == same
    for a, b in zip(first, second, strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
            assert not np.isnan(getattr(a, field)).any()


def test_advantages_are_whitened_over_the_whole_step(trajectories):
    inputs = [arrays(trajectories, seed) for seed in (1, 2, 3)]
    experience, _ = experience_of(PolicyGradient(PolicyGradientConfig(), 8), trajectories, [1, 2, 3], *inputs, KL_COEF)
    own = np.concatenate([e.advantages[e.loss_mask] for e in experience])
    assert own.mean() == pytest.approx(0, abs=1e-6) and own.std() == pytest.approx(1, abs=1e-5)


def test_order_of_trajectories_does_not_matter(trajectories):
    inputs = [arrays(trajectories, seed) for seed in (1, 2, 3)]
    one, _ = experience_of(PLAIN, trajectories, [1, 2, 3], *inputs, KL_COEF)
    other, _ = experience_of(PLAIN, trajectories[::-1], [3, 2, 1], *(part[::-1] for part in inputs), KL_COEF)
    for a, b in zip(one, other[::-1], strict=True):
        np.testing.assert_allclose(a.advantages, b.advantages, atol=1e-6)


def test_explained_variance():
    torch.manual_seed(0)
    returns, mask = torch.randn(4, 5), torch.rand(4, 5) < 0.7
    assert explained_variance(returns + 3, returns, mask) == pytest.approx(1, abs=1e-6)
    assert explained_variance(torch.full((4, 5), 7.0), returns, mask) == pytest.approx(0, abs=1e-5)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3, abs=1e-5)


@pytest.mark.parametrize("broken", [0.01, float("nan")])
def test_samples_that_the_trainer_would_not_have_drawn_are_refused(trajectories, broken: float):
    """Trainer and rollout disagree on one token of one trajectory, or the trainer has no number for it."""
    old = [t.rollout_logprobs.copy() for t in trajectories]
    zeros = [np.zeros(len(t.token_ids), dtype=np.float32) for t in trajectories]
    _, metrics = experience_of(PLAIN, trajectories, [0, 0, 0], old, zeros, zeros, KL_COEF)
    check_on_policy(metrics, 1e-4)
    old[1][5] += broken
    _, metrics = experience_of(PLAIN, trajectories, [0, 0, 0], old, zeros, zeros, KL_COEF)
    with pytest.raises(NumericsError):
        check_on_policy(metrics, 1e-4)


def test_the_penalty_for_length_is_dapo_s_soft_punishment():
    """Yu et al. 2025, eq. 13, with L_max 10 and L_cache 2: 0 up to 8 tokens, ((L_max - L_cache) - n) / L_cache, -1."""
    expected = {1: 0.0, 8: 0.0, 9: (8 - 9) / 2, 10: -1.0}
    for n, penalty in expected.items():
        assert overlong_penalty(n, limit=10, share=0.2, penalty=1.0) == pytest.approx(penalty)
    assert overlong_penalty(10, limit=10, share=0.2, penalty=0.5) == pytest.approx(-0.5)
    assert overlong_penalty(10, limit=10, share=0.0, penalty=1.0) == 0.0


def test_the_penalty_is_learned_from_and_makes_no_group_informative(trajectories):
    long, short = (replace(t, draw_id=1) for t in trajectories[:2])
    scored = [Scored(t, 1.0, None, *arrays([t], 1), None, None, penalty=p) for t, p in ((long, -0.5), (short, 0.0))]
    assert not is_informative(scored)
    grouped = PolicyGradient(PolicyGradientConfig(advantage=Advantage.leave_one_out, whiten_advantages=False), 8)
    experience, metrics = build_experience(grouped, scored, kl_coef=0.0)
    assert metrics["reward/mean"] == pytest.approx(0.75)
    assert [e.advantages[e.loss_mask].tolist() for e in experience] == [[-0.5] * 3, [0.5] * 3]


def test_minibatches_are_a_permutation_cut_in_parts():
    parts = minibatches(10, 4, seed=1, step=2, epoch=0)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sorted(index for part in parts for index in part) == list(range(10))


def test_minibatches_are_a_function_of_seed_step_and_epoch():
    def order(seed: int, step: int, epoch: int) -> tuple[int, ...]:
        return tuple(minibatches(64, 64, seed, step, epoch)[0])

    assert order(1, 2, 3) == order(1, 2, 3)
    keys = [(seed, step, epoch) for seed in range(3) for step in range(3) for epoch in range(3)]
    assert len({order(*key) for key in keys}) == len(keys)


def test_minibatches_of_successive_epochs_are_not_one_order_shifted():
    """The ranks of each element in two epochs are uncorrelated, at any shift."""
    ranks = [np.argsort(minibatches(512, 512, seed=1, step=0, epoch=e)[0]) for e in range(2)]
    for shift in range(-8, 9):
        first, second = (ranks[0][8 + shift : 504 + shift], ranks[1][8:504])
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.25  # five and a half deviations of 496 pairs


def test_rollout_and_trainer_are_compared_on_tokens_of_the_same_weights():
    stale = trajectory([3, 4, 5, 6], [0, 1, 1, 1], draw_id=1)
    fresh = replace(stale, weight_versions=np.array([-1, 6, 7, 7], dtype=np.int32))  # its first token is older
    old = [np.array([9, -4, -1, -1], dtype=np.float32), np.array([9, -3, -1, -1.5], dtype=np.float32)]
    assert logprob_difference([stale, fresh], old) == 3
    assert logprob_difference([stale, fresh], old, weights=7) == 0.5
    assert logprob_difference([stale, fresh], old, weights=8) is None
    old[1][3] = np.nan
    assert np.isnan(logprob_difference([fresh, fresh], [old[1], np.zeros(4, np.float32)], weights=7))
    scored = [Scored(t, 1.0, None, o, None, None) for t, o in zip([stale, fresh], old, strict=True)]
    assert "rollout/logprob_diff" not in build_experience(PLAIN, scored, 0.0, weights=8)[1]
    check_on_policy({}, 1e-4)  # nothing to compare
