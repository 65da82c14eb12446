"""The account of draws: each begins once and ends once."""

from __future__ import annotations

from typing import Any

import pytest

from llmscale.errors import RunError
from llmscale.rl.ledger import End, Ledger


def test_draws_are_numbered_and_end_with_what_is_known_of_them() -> None:
    written: list[Any] = []
    ledger = Ledger(written.extend)
    assert ledger.begin(2, updates=0) == [0, 1] and ledger.begin(1, updates=4) == [2]
    ledger.end(1, End.trained, {1: {"staleness": 0}})
    ledger.end(5, End.dropped, {0: {"why": "too easy"}})
    assert ledger.open == {2: 4}
    assert written == [
        {"step": 1, "draw_id": 1, "end": "trained", "begun": 0, "staleness": 0},
        {"step": 5, "draw_id": 0, "end": "dropped", "begun": 0, "why": "too easy"},
    ]


@pytest.mark.parametrize(("draw", "what"), [(0, "draw 0 ends a second time"), (1, "draw 1 ends and was never begun")])
def test_no_draw_ends_twice(draw: int, what: str) -> None:
    ledger = Ledger(lambda records: None)
    ledger.begin(1, updates=0)
    ledger.end(1, End.trained, {0: {}})
    with pytest.raises(RunError, match=what):
        ledger.end(1, End.dropped, {draw: {}})


def test_a_requeued_draw_keeps_its_number_and_ends_later() -> None:
    before, written = Ledger(lambda records: None), []
    before.begin(3, updates=1)
    after = Ledger(written.extend)
    after.load_state_dict(before.state_dict())
    after.requeue(3, [1, 2], 2, "lost")
    assert after.open == {0: 1, 1: 2, 2: 2} and after.begin(1, updates=2) == [3]
    after.end(3, End.trained, {1: {}})
    ends = [(record["draw_id"], record["end"], record["begun"]) for record in written]
    assert ends == [(1, "requeued", 1), (2, "requeued", 1), (1, "trained", 2)]
    assert before.open.keys() == {0, 1, 2}, "a state is a copy"
