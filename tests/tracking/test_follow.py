"""What one process writes into the run directory is shown by another, once, also when the file is cut in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmscale.tracking.composite import NullTracker
from llmscale.tracking.follow import following


class Shown(NullTracker):
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.said: list[Any] = []

    def log(self, step: int, metrics: Any) -> None:
        self.steps.append(step)

    def event(self, kind: str, **details: Any) -> None:
        self.said.append((kind, details))

    def finish(self, status: str) -> None:
        self.said.append(status)


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "train/loss": 0.5 * step, "time_s": 1.0}) + "\n" for step in steps)


def test_only_what_is_new_is_shown(tmp_path: Path) -> None:
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    metrics.write_text(lines(1, 2))
    shown = Shown()
    with following(tmp_path, shown):
        with metrics.open("a") as file:
            file.write(lines(3, 4) + '{"step": 5, "tr')
        events.write_text('{"kind": "resumed", "step": 2}\n{"kind": "finished", "status": "done"}\n')
    assert shown.steps == [3, 4]
    assert shown.said == [("resumed", {"step": 2}), "done"]


def test_a_file_that_was_cut_and_has_grown_again(tmp_path: Path) -> None:
    """A run that resumes cuts off the steps that it repeats; by the next look it may be further than it was."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(lines(1, 2, 3))
    shown = Shown()
    with following(tmp_path, shown):
        rewritten = tmp_path / "new"
        rewritten.write_text(lines(1).replace("0.5", "0.512345") + lines(2, 3, 4, 5))
        rewritten.replace(metrics)
    assert shown.steps == [4, 5]
