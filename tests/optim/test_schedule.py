"""The learning rate at the corners of its schedule."""

from __future__ import annotations

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


@EACH
def test_never_rises_after_the_warm_up(schedule: Schedule):
    rates = [learning_rate(config(schedule), step, 50) for step in range(4, 60)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"lr": -1}, "lr"),
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"grad_clip": -1}, "grad_clip"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, where: str):
    check(OptimConfig())
    with pytest.raises(ConfigError) as caught:
        check(OptimConfig(**settings))
    assert caught.value.where == where
