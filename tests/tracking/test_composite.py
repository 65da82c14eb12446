from __future__ import annotations

import pytest

from llmscale.tracking.composite import CompositeTracker, NullTracker, open_trackers
from llmscale.tracking.config import TrackingConfig, WandbMode
from llmscale.tracking.jsonl import EVENTS, METRICS, SAMPLES, JsonlTracker, read_jsonl


class Recorder:
    def __init__(self, calls, name, fails=False):
        self.calls, self.name, self.fails = calls, name, fails

    def log(self, step, metrics):
        self.calls.append((self.name, step, dict(metrics)))

    def samples(self, step, records):
        self.calls.append((self.name, step, list(records)))

    def event(self, kind, **details):
        self.calls.append((self.name, kind, details))

    def finish(self, status):
        self.calls.append((self.name, "finish", status))
        if self.fails:
            raise RuntimeError(self.name)


def test_passes_everything_to_each():
    calls = []
    tracker = CompositeTracker([Recorder(calls, "a"), Recorder(calls, "b")])
    tracker.log(1, {"x": 2.0})
    tracker.samples(1, [{"t": "u"}])
    tracker.event("saved", step=1)
    expected = [(1, {"x": 2.0}), (1, [{"t": "u"}]), ("saved", {"step": 1})]
    assert calls == [(name, *rest) for rest in expected for name in "ab"]


def test_every_tracker_is_finished_even_if_one_fails():
    calls = []
    with pytest.raises(RuntimeError, match="b"):
        CompositeTracker([Recorder(calls, "a"), Recorder(calls, "b", fails=True)]).finish("done")
    assert calls == [("b", "finish", "done"), ("a", "finish", "done")]


def drive(tracker):
    tracker.log(1, {"train/loss": 1.0})
    tracker.samples(1, [{"completion": "x"}])
    tracker.event("saved")
    tracker.finish("done")


def open_in(run_dir, **settings):
    return open_trackers(
        TrackingConfig(wandb=WandbMode.disabled, **settings),
        run_dir=run_dir,
        run_id="demo",
        title="sft demo",
        total_steps=1,
        resume_step=-1,
        run_config={},
    )


def test_the_null_tracker_leaves_no_trace(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drive(NullTracker())
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_without_wandb_the_run_is_on_disk_and_on_the_console(tmp_path, capsys):
    drive(open_in(tmp_path / "runs" / "demo"))
    files = {path.name: read_jsonl(path) for path in (tmp_path / "runs" / "demo").iterdir()}
    assert set(files) == {METRICS, SAMPLES, EVENTS}
    assert files[METRICS][0]["train/loss"] == 1.0 and files[SAMPLES][0]["completion"] == "x"
    assert [e["kind"] for e in files[EVENTS]] == ["saved", "finished"]
    assert "sft demo: step 1/1  train/loss 1" in capsys.readouterr().err


def test_resuming_cuts_the_records(tmp_path):
    JsonlTracker(tmp_path, -1).log(5, {})
    open_in(tmp_path)
    assert read_jsonl(tmp_path / METRICS) == []
