"""Faults on purpose come by a plan. What they do to a run is in tests/stages/test_lost_roles.py."""

from __future__ import annotations

from itertools import islice

import numpy as np

from llmscale.cluster.chaos import schedule
from llmscale.cluster.config import ChaosConfig


def test_the_schedule_is_a_function_of_the_seed_and_goes_on_where_it_was() -> None:
    config = ChaosConfig(kill=["rollout", "critic"], delay=["reward"], every_s=10.0)
    plan = list(islice(schedule(config, ["reward", "rollout"]), 400))
    assert plan[100:] == list(islice(schedule(config, ["reward", "rollout"], begin=100), 300))
    assert {(p.action, p.role) for p in plan} == {("kill", "rollout"), ("delay", "reward")}, "there is no critic"
    assert abs(np.mean([p.after_s for p in plan]) - 10.0) < 2.0
    assert all(0 <= p.share < 1 for p in plan)
    other = ChaosConfig(seed=1, kill=["rollout", "critic"], delay=["reward"], every_s=10.0)
    assert list(islice(schedule(other, ["reward", "rollout"]), 400)) != plan
    assert list(schedule(config, ["policy"])) == []


def test_what_hits_no_worker_needs_no_role() -> None:
    config = ChaosConfig(cut=["rollout"], corrupt=True, fill=True)
    roles = {"policy": {("fill", "")}, "rollout": {("cut", "rollout"), ("corrupt", "rollout"), ("fill", "")}}
    for role, found in roles.items():
        assert {(p.action, p.role) for p in islice(schedule(config, [role]), 100)} == found
