"""How old samples are, and how many draws may be under way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmscale.errors import WeightMismatchError
from llmscale.rl.staleness import age_metrics, check_staleness, room, staleness
from tests.tiny import trajectory


def test_the_room_is_that_of_the_bound_and_of_the_steps_that_are_left() -> None:
    assert [room(bound, 8, steps_left=5, under_way=0) for bound in (0, 1, 4, 9)] == [8, 16, 40, 40]
    assert room(1, 8, steps_left=5, under_way=11) == 5
    assert room(3, 8, steps_left=1, under_way=11) == 0


@pytest.mark.parametrize("bound", range(5))
def test_the_oldest_first_keeps_any_bound(bound: int) -> None:
    """The proof in the module's head, counted out: with steps that take more than they have to, too."""
    rng, waiting, oldest = np.random.default_rng(bound), [], 0
    for step in range(60):
        waiting += [step] * room(bound, 4, 60 - step, len(waiting))
        taken = 4 + int(rng.integers(0, 3)) * (step % 3 == 0)
        oldest = max(oldest, *(step - begun for begun in waiting[:taken]))
        waiting = waiting[taken:]
    assert oldest == bound


def test_a_sample_is_as_old_as_its_oldest_token() -> None:
    turns = trajectory([3, 4, 5, 6, 7], [0, 1, 0, 1, 1])
    mixed = replace(turns, weight_versions=np.array([-1, 12, -1, 7, 12], dtype=np.int32))
    silent = trajectory([3, 4], [0, 0])
    updates = {7: 3, 12: 5}  # versions go on counting over restarts, updates do not
    assert staleness([mixed, silent, trajectory([3, 4], [0, 1], version=12)], updates, now=6).tolist() == [3, 0, 1]
    assert staleness([trajectory([3, 4], [0, 1], version=2)], updates, now=6).tolist() == [4], (
        "a version that is forgotten"
    )
    assert age_metrics({4: 1, 5: 2}) == {"rollout/staleness": 1.5, "rollout/staleness_max": 2.0}


def test_what_is_too_old_is_named() -> None:
    samples = [trajectory([3, 4], [0, 1], draw_id=8), trajectory([3, 4], [0, 1], draw_id=9, sample_index=2)]
    check_staleness(samples, np.array([0, 2]), bound=2)
    with pytest.raises(WeightMismatchError, match="made 3 updates ago, the bound is 2") as caught:
        check_staleness(samples, np.array([0, 3]), bound=2)
    assert caught.value.where == "draw 9, sample 2"
