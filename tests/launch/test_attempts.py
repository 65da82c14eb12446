"""What an attempt leaves behind, and when there is another."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmscale.checkpoint.commit import CheckpointStore
from llmscale.launch.attempts import all_attempts, begin, cancel_file, end, progress, read


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    return tmp_path


def save(run: Path, step: int) -> None:
    CheckpointStore(run / "checkpoints").save(step, lambda folder: (folder / "x").write_text("x") and None)


def one(run: Path, code: int, step: int | None, why: str | None = None, max_retries: int = 2) -> bool:
    folder = begin(run, "7", ["node1"], max_retries)
    if step is not None:
        save(run, step)
    return end(folder, code, why)


def test_what_is_noted(run: Path) -> None:
    assert not one(run, 1, None, "why")
    noted = all_attempts(run)[1]
    assert {k: v for k, v in noted.items() if not k.endswith("_s")} == {
        "job": "7", "nodes": ["node1"], "max_retries": 2, "before": [0, 0], "exit_code": 1, "after": [0, 0],
        "advanced": False, "why": "why", "again": False,
    }  # fmt: skip
    assert noted["ended_s"] >= noted["began_s"]


def test_saved_and_further_is_free(run: Path) -> None:
    assert all(one(run, 75, step, max_retries=0) for step in range(1, 6))
    assert progress(run) == [5, 0]


def test_saved_but_no_further_is_repeated_within_the_budget(run: Path) -> None:
    assert [one(run, 75, None) for _ in range(3)] == [True, True, False]


def test_a_failure_is_repeated_only_after_a_step_and_within_the_budget(run: Path) -> None:
    assert not one(run, 1, None)
    assert [one(run, 1, step) for step in (1, 2, 3)] == [True, False, False]  # the one before counts too


@pytest.mark.parametrize("code", [0, 2, 3, 64, 130])
def test_what_would_end_the_same_way_is_not_repeated(run: Path, code: int) -> None:
    assert not one(run, code, 1)


def test_a_run_that_is_cancelled_or_done_stays_so(run: Path) -> None:
    cancel_file(run).touch()
    assert not one(run, 75, 1)
    cancel_file(run).unlink()
    (run / "result.json").touch()
    assert not one(run, 1, 2)


@pytest.mark.parametrize(("code", "noted"), [(138, 75), (143, 75), (1, 1)])
def test_a_signal_that_came_too_early_is_a_request_to_stop(run: Path, code: int, noted: int) -> None:
    folder = begin(run, "7", ["node1"], 2)
    assert end(folder, code, "asked") is (noted == 75)
    assert read(folder)["exit_code"] == noted


def test_a_stage_without_checkpoints_gets_further_by_its_completions(run: Path) -> None:
    folder = begin(run, "7", ["node1"], 0)
    (run / "completions.jsonl").write_text("{}\n")
    assert end(folder, 75)
