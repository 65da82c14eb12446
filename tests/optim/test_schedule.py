"""The learning rate at the corners of its schedule."""

from __future__ import annotations

from itertools import pairwise

import pytest

from llmscale.config import check
from llmscale.errors import ConfigError
from llmscale.optim.config import OptimConfig, Schedule
from llmscale.optim.schedule import learning_rate

EACH = pytest.mark.parametrize("schedule", Schedule)


def config(schedule: Schedule, warmup_steps: int = 4, min_lr_ratio: float = 0.1) -> OptimConfig:
    return OptimConfig(lr=2.0, schedule=schedule, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)


@EACH
def test_warms_up_linearly_and_never_starts_at_zero(schedule: Schedule):
    assert [learning_rate(config(schedule), step, 20) for step in range(5)] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


@EACH
def test_ends_where_it_should(schedule: Schedule):
    end = 2.0 if schedule is Schedule.constant else 0.2
    for step in (19, 20, 1000):  # the last step, and whoever goes on
        assert learning_rate(config(schedule), step, 20) == pytest.approx(end)


@EACH
def test_without_warm_up_it_starts_at_the_peak(schedule: Schedule):
    assert learning_rate(config(schedule, warmup_steps=0), 0, 20) == 2.0


@EACH
def test_a_run_of_one_step(schedule: Schedule):
    assert learning_rate(config(schedule, warmup_steps=0), 0, 1) == 2.0
    assert learning_rate(config(schedule, warmup_steps=4), 0, 1) == 0.5


@EACH
def test_a_warm_up_as_long_as_the_run(schedule: Schedule):
    assert [learning_rate(config(schedule), step, 4) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert learning_rate(config(schedule, warmup_steps=10), 3, 4) == pytest.approx(0.8)


def test_half_way():
    """Five steps after a warm-up of none: the middle one is half way down."""
    for schedule in (Schedule.linear, Schedule.cosine):
        assert learning_rate(config(schedule, 0, 0.0), 2, 5) == pytest.approx(1.0)
    assert learning_rate(config(Schedule.linear, 0, 0.0), 1, 5) == pytest.approx(1.5)
    assert learning_rate(config(Schedule.cosine, 0, 0.0), 1, 5) == pytest.approx(1 + 0.5**0.5)


def test_wsd_is_stable_and_then_decays_as_one_minus_a_root():
    """Of 40 steps after a warm-up of 10, the last quarter decays: from step 39 to step 49, which is the last."""
    wsd = OptimConfig(lr=2.0, schedule=Schedule.wsd, warmup_steps=10, decay_fraction=10 / 39, min_lr_ratio=0.1)
    rates = [learning_rate(wsd, step, 50) for step in range(52)]
    assert rates[9:40] == [2.0] * 31
    assert rates[40:50] == pytest.approx([0.2 + 1.8 * (1 - (i / 10) ** 0.5) for i in range(1, 11)])
    assert rates[49:] == pytest.approx([0.2] * 3) and rates[48] > 0.25


@pytest.mark.parametrize("decay_fraction", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [2, 3, 5, 100])
def test_the_decay_of_wsd_is_over_at_the_last_step_of_any_run(decay_fraction: float, num_steps: int):
    wsd = OptimConfig(lr=2.0, schedule=Schedule.wsd, warmup_steps=1, decay_fraction=decay_fraction, min_lr_ratio=0.0)
    assert learning_rate(wsd, num_steps - 1, num_steps) == (0.0 if num_steps > 2 else 2.0)
    assert learning_rate(wsd, 1, num_steps) == 2.0


@EACH
def test_has_no_jumps(schedule: Schedule):
    """Of twice as many steps, each changes the rate by less: half as much, or 1 / sqrt(2) where a root begins."""
    largest = []
    for num_steps in (1000, 2000):
        settings = config(schedule, warmup_steps=num_steps // 10)
        rates = [learning_rate(settings, step, num_steps) for step in range(num_steps)]
        largest.append(max(abs(b - a) for a, b in pairwise(rates)))
    assert largest[1] < 0.75 * largest[0]


@EACH
def test_never_rises_after_the_warm_up(schedule: Schedule):
    rates = [learning_rate(config(schedule), step, 50) for step in range(4, 60)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"lr": -1}, "lr"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": []}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"grad_clip": -1}, "grad_clip"),
        ({"decay_fraction": 0.0}, "decay_fraction"),
        ({"decay_fraction": 1.1}, "decay_fraction"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, where: str):
    check(OptimConfig())
    with pytest.raises(ConfigError) as caught:
        check(OptimConfig(**settings))
    assert caught.value.where == where
