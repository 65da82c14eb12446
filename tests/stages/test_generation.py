"""Draws on their way: under any schedule none is lost, none used twice, none older than the bound when it is trained on."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmscale.stages.generation import Unit, done
from llmscale.stages.inspection import account
from tests.stages.runs import records
from tests.stages.simulated import PROMPTS, Simulation

SCHEDULES = range(8)
FILTER = ["algorithm.filter_groups=true", "algorithm.max_draws=3"]
ABORT = ["rollout.on_update=abort"]


def finished(folder: Path, seed: int, bound: int, *overrides: str) -> Simulation:
    folder.mkdir()
    simulation = Simulation(folder, seed, bound, *overrides)
    simulation.run()
    return simulation


def ages(simulation: Simulation) -> list[int]:
    """Of every sample that was trained on, by what made its tokens and not by what the loop believes."""
    return [step - 1 - simulation.made_at[v] for step, _, versions in simulation.trained for v in versions]


@pytest.mark.parametrize(
    ("bound", "overrides"),
    [(0, []), (1, []), (3, []), (0, FILTER), (1, FILTER), (3, FILTER), (1, ABORT), (3, ABORT + FILTER)],
)
def test_every_draw_ends_once_and_none_is_too_old(bound: int, overrides: list[str], tmp_path: Path) -> None:
    oldest, of_several_versions = [], 0
    for seed in SCHEDULES:
        simulation = finished(tmp_path / str(seed), seed, bound, *overrides)
        oldest.append(max(ages(simulation)))
        of_several_versions += sum(len(versions) > 1 for _, _, versions in simulation.trained)
        ends = records(tmp_path / str(seed) / "draws.jsonl")
        final = Counter(e["draw_id"] for e in ends if e["end"] != "requeued")
        assert sorted(final) == list(range(len(final))) and set(final.values()) == {1}
        trained = [e["draw_id"] for e in ends if e["end"] == "trained"]
        assert Counter(draw for _, draw, _ in simulation.trained) == Counter(trained * 2)  # both samples of each
        assert all(e["why"] for e in ends if e["end"] != "trained")
        assert {e["staleness"] for e in ends if e["end"] == "trained"} <= set(range(bound + 1))
        if FILTER[0] not in overrides:
            assert len(final) == 9 * 3 and trained == sorted(trained), "the oldest first, and no more than are needed"
    assert max(oldest) == bound, "what is allowed is made use of"
    assert (of_several_versions > 0) == (ABORT[0] in overrides)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bound=st.integers(0, 4), seed=st.integers(0, 2**32 - 1), kills=st.lists(st.integers(1, 90), max_size=5))
def test_wherever_the_driver_is_killed_the_account_adds_up(
    bound: int, seed: int, kills: list[int], tmp_path: Path
) -> None:
    """Where an example fails, the kills that it needs are found: Hypothesis leaves out the others."""
    with TemporaryDirectory(dir=tmp_path) as folder:
        simulation = Simulation(Path(folder), seed, bound, kills=kills)
        simulation.run()
        found = account(records(Path(folder) / "draws.jsonl"))
    assert found["wrong"] == [] and found["trained"] + found["dropped"] == found["ended"] == 9 * 3
    assert max(ages(simulation)) <= bound and max(found["staleness"]) <= bound
    trained = Counter(draw for _, draw, _ in simulation.trained)
    assert set(trained.values()) == {2} and len(trained) == found["trained"], "each of its samples once"


def test_what_is_trained_depends_on_no_schedule(tmp_path: Path) -> None:
    """Which draws each step takes is a matter of counting, also where some are replaced and the driver is killed."""
    runs = [finished(tmp_path / str(seed), seed, 2, *FILTER) for seed in SCHEDULES]
    taken = [[(step, draw) for step, draw, _ in run.trained] for run in runs]
    assert all(other == taken[0] for other in taken)
    assert len(PROMPTS.train) < len({draw for _, draw in taken[0]})


def test_what_was_lost_and_made_again_is_judged_again() -> None:
    """Newer weights made it, perhaps: the scores of what was lost are not its own."""

    class Made(Future):
        newest: Future

    first, again = Made(), done(["new"])
    first.set_result(["old"])
    first.newest = first
    unit = Unit(first, done(("scores of", first)), lambda samples: ("scores of", samples))
    unit.show_again()
    assert unit.shown.result() == ("scores of", first)
    first.newest = again
    unit.show_again()
    assert unit.shown.result() == ("scores of", again)
