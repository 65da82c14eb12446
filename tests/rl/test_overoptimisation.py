"""The report on over-optimisation: what it finds in runs whose course is known. Whether it is right about a real run is in
tests/stages/test_overoptimisation.py."""

from __future__ import annotations

import numpy as np
import pytest

from llmscale.rl.overoptimisation import SIGMAS, overoptimisation


def course(learned, true, noise: float = 0.02, seed: int = 0, num: int = 60) -> list[dict[str, float]]:
    """A run's records; `learned` and `true` are functions of the progress from 0 to 1."""
    rng = np.random.default_rng(seed)
    return [
        {
            "step": step,
            "reward/mean": learned(x) + noise * rng.normal(),
            "reward/true": true(x) + noise * rng.normal(),
            "kl/ref": 4 * x,
        }
        for step, x in enumerate(np.linspace(0, 1, num), start=1)
    ]


def rising(x: float) -> float:
    return x


def hump(x: float) -> float:
    """Gao et al. 2023: up to the middle, then down."""
    return 1 - 4 * (x - 0.5) ** 2


def test_a_true_score_that_turns_while_the_learned_one_rises_is_found():
    found = overoptimisation(course(rising, hump))
    assert found.found
    assert found.best.first_step <= 31 <= found.best.last_step + 6  # the middle of 60 steps
    assert found.best.sqrt_kl == pytest.approx(2**0.5, abs=0.3)
    assert found.verdict.startswith(f"over-optimised after step {found.best.last_step} (sqrt KL ")
    assert "true score 0.9" in found.verdict


def test_one_that_falls_from_the_start_is_found():
    found = overoptimisation(course(rising, lambda x: -x))
    assert found.found and found.best.first_step == 1


@pytest.mark.parametrize(
    ("learned", "true"),
    [
        (rising, rising),  # as it should be
        (rising, lambda x: min(x, 0.5)),  # levels off
        (lambda x: -x, lambda x: -x),  # both fall: the policy broke, nothing was optimised
        (lambda x: 0.5, hump),  # the learned one has nothing to do with it
    ],
)
def test_other_courses_are_not(learned, true):
    found = overoptimisation(course(learned, true))
    assert not found.found and found.verdict.startswith("no over-optimisation seen: true score ")


def test_noise_alone_is_hardly_ever_taken_for_it():
    flat = [overoptimisation(course(rising, lambda x: 0.0, noise=0.3, seed=seed)).found for seed in range(300)]
    assert sum(flat) <= 6  # of 300: 2%


def test_the_errors_are_those_of_the_means():
    """Over many runs of one course, the differences scatter as the report says."""
    found = [overoptimisation(course(rising, lambda x: -x, noise=0.3, seed=seed)) for seed in range(300)]
    for name in ("fall", "rise"):
        scatter = np.std([getattr(f, name) for f in found if f.best.first_step == 1])
        assert np.mean([getattr(f, f"{name}_error") for f in found]) == pytest.approx(scatter, rel=0.15)


def test_parts_are_means_of_consecutive_steps():
    records = course(rising, hump, num=23)
    found = overoptimisation(records)
    assert [(p.first_step, p.last_step) for p in found.parts] == [(1, 5), (6, 10), (11, 15), (16, 19), (20, 23)]
    for part in found.parts:
        own = [r for r in records if part.first_step <= r["step"] <= part.last_step]
        assert part.learned == pytest.approx(np.mean([r["reward/mean"] for r in own]))
        assert part.true == pytest.approx(np.mean([r["reward/true"] for r in own]))
        assert part.sqrt_kl == pytest.approx(np.sqrt(np.mean([r["kl/ref"] for r in own])))


def test_what_says_nothing_gives_no_report():
    assert overoptimisation([]) is None
    assert overoptimisation(course(rising, hump, num=7)) is None
    without = [{k: v for k, v in r.items() if k != "reward/true"} for r in course(rising, hump)]
    assert overoptimisation(without) is None
    evaluations = [{"step": 0, "eval/reward/true": 1.0}]
    assert overoptimisation([*evaluations, *course(rising, hump)]) == overoptimisation(course(rising, hump))


def test_the_table_can_be_read():
    found = overoptimisation(course(rising, hump))
    lines = found.table().splitlines()
    assert lines[0].startswith("Over-optimised after step") and f"{SIGMAS:g} errors" in lines[2]
    assert len(lines) == 6 + len(found.parts) and lines[-1].startswith("| 55-60 | ")
