from __future__ import annotations

import pytest

from llmscale.cluster import restarts
from llmscale.cluster.restarts import Restarts


def test_restarts_are_counted_by_worker_and_cause_within_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now[0])
    budget = Restarts(2)
    assert [budget.take("rollout 0", "died") for _ in range(4)] == [2, 1, 0, 0]
    assert budget.take("rollout 0", "hung") == 2 and budget.take("rollout 1", "died") == 2
    budget.give_back("rollout 0", "died")
    assert [budget.take("rollout 0", "died") for _ in range(2)] == [1, 0]
    now[0] += restarts.WINDOW_S + 1
    assert budget.take("rollout 0", "died") == 2
    assert Restarts(0).take("rollout 0", "died") == 0
