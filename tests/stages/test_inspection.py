"""What `llmscale inspect` makes of the records of a run; test_staleness.py has the verb itself."""

from __future__ import annotations

import json
from pathlib import Path

from llmscale.stages.inspection import account, as_text, inspect
from tests.stages.runs import run

ENDS = [
    {"step": 1, "draw_id": 0, "end": "trained", "begun": 0, "staleness": 0},
    {"step": 1, "draw_id": 1, "end": "dropped", "begun": 0, "why": "dull"},
    {"step": 2, "draw_id": 2, "end": "requeued", "begun": 0, "why": "lost"},
    {"step": 2, "draw_id": 2, "end": "trained", "begun": 1, "staleness": 1},
]


def write(folder: Path, ends: list[dict]) -> None:
    (folder / "attempts" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "attempts" / "2").mkdir(exist_ok=True)
    events = [
        {"time_s": 0.0, "kind": "plan", "max_staleness": 1, "correction": "truncated"},
        {"time_s": 1.0, "kind": "worker_lost", "where": "rollout 1", "why": "this worker\ndied"},
        {"time_s": 2.0, "kind": "finished", "status": "failed"},
        {"time_s": 3.0, "kind": "plan", "max_staleness": 1, "correction": "truncated"},
        {"time_s": 4.0, "kind": "sample_excluded", "draw_id": 1},
    ]
    for name, records in (("draws", ends), ("events", events), ("metrics", [{"step": 2}, {"step": 1}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "weight_version").write_text("3\n")


def test_draws_are_counted_by_their_ends() -> None:
    found = account(ENDS)
    assert (found["ended"], found["trained"], found["dropped"], found["requeued"]) == (3, 2, 1, 1)
    assert found["why"] == {"dropped": {"dull": 1}, "requeued": {"lost": 1}}
    assert found["staleness"] == {0: 1, 1: 1} and found["wrong"] == []
    assert account([])["wrong"] == []


def test_a_draw_that_ended_twice_or_never_is_found(tmp_path: Path) -> None:
    assert account([*ENDS, ENDS[0], {**ENDS[0], "draw_id": 5}])["wrong"] == [0, 3, 4]
    write(tmp_path, [ENDS[0], ENDS[0]])
    assert run(["inspect", str(tmp_path)], tmp_path / "log") == 1
    assert "WRONG: these ended twice or never: [0]" in (tmp_path / "log").read_text()


def test_a_run_that_goes_on_is_shown_with_what_happened_to_it(tmp_path: Path) -> None:
    write(tmp_path, ENDS)
    text = as_text(inspect(tmp_path))
    assert "going on, or killed at step 2, 2 attempts" in text and "3 versions published; samples left out: 1" in text
    assert "worker_lost        where=rollout 1 why=this worker died" in text
    assert "       1  dull" in text and "at most 1" in text and "plan" not in text
