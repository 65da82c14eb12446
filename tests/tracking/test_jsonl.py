from __future__ import annotations

import json
import math
import time

import numpy as np
import pytest

from llmscale.errors import DataError, RunError
from llmscale.tracking.jsonl import EVENTS, METRICS, SAMPLES, JsonlTracker, RecordFile, iter_located, read_jsonl


def write_run(directory, steps):
    tracker = JsonlTracker(directory, -1)
    for step in steps:
        tracker.log(step, {"train/loss": float(step)})
        tracker.samples(step, [{"completion": f"{step}a"}, {"completion": f"{step}b"}])
        tracker.event("saved", step=step)
    return tracker


def steps_of(path):
    return [record["step"] for record in read_jsonl(path)]


def test_records_are_on_disk_when_the_call_returns(tmp_path):
    before = time.time()
    write_run(tmp_path, [1, 2])  # not finished
    first, second = read_jsonl(tmp_path / METRICS)
    assert first["step"] == 1 and first["train/loss"] == 1.0 and second["step"] == 2
    assert before - 0.01 <= first["time_s"] <= second["time_s"] <= time.time() + 0.01
    assert [r["completion"] for r in read_jsonl(tmp_path / SAMPLES)] == ["1a", "1b", "2a", "2b"]
    assert read_jsonl(tmp_path / EVENTS)[0].items() >= {"kind": "saved", "step": 1}.items()


def test_resume_cuts_later_steps_and_goes_on(tmp_path):
    write_run(tmp_path, [0, 1, 2, 3, 4])
    before = (tmp_path / METRICS).read_bytes()
    tracker = JsonlTracker(tmp_path, 2)
    assert before.startswith((tmp_path / METRICS).read_bytes())  # what stays, stays byte for byte
    tracker.log(3, {"train/loss": 30.0})
    assert steps_of(tmp_path / METRICS) == [0, 1, 2, 3]
    assert read_jsonl(tmp_path / METRICS)[-1]["train/loss"] == 30.0
    assert steps_of(tmp_path / SAMPLES) == [0, 0, 1, 1, 2, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([METRICS, SAMPLES, EVENTS])


def test_resume_keeps_every_event_and_says_what_was_cut(tmp_path):
    write_run(tmp_path, [1, 2, 3]).finish("failed")
    JsonlTracker(tmp_path, 1)
    events = read_jsonl(tmp_path / EVENTS)
    assert [e["kind"] for e in events] == ["saved", "saved", "saved", "finished", "records_cut"]
    assert events[3]["status"] == "failed"
    assert events[4].items() >= {"resume_step": 1, "metrics": 2, "samples": 4}.items()


def test_starting_over_cuts_step_zero_too(tmp_path):
    write_run(tmp_path, [0, 1])
    JsonlTracker(tmp_path, -1)
    assert read_jsonl(tmp_path / METRICS) == []


@pytest.mark.parametrize("torn", [b'{"step": 3, "train/lo', b"{", b"\0" * 40, b"\xff\xfe", b"12"])
@pytest.mark.parametrize("name", [METRICS, SAMPLES, EVENTS])
def test_a_torn_end_is_dropped(tmp_path, name, torn):
    write_run(tmp_path, [1, 2]).finish("failed")
    path = tmp_path / name
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert len(read_jsonl(path)) == whole.count(b"\n")
    JsonlTracker(tmp_path, 2)
    assert path.read_bytes() == whole


def test_a_whole_record_without_its_newline_is_kept(tmp_path):
    write_run(tmp_path, [1, 2])
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    JsonlTracker(tmp_path, 2).log(3, {})
    assert steps_of(path) == [1, 2, 3]


def test_damage_before_the_end_is_an_error_with_its_line(tmp_path):
    write_run(tmp_path, [1, 2, 3])
    path = tmp_path / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([lines[0], b'{"step": 2, "tr\n', lines[2]])
    path.write_bytes(damaged)
    for read in (lambda: read_jsonl(path), lambda: JsonlTracker(tmp_path, 1)):
        with pytest.raises(DataError) as caught:
            read()
        assert caught.value.where == f"{path}:2"
    assert path.read_bytes() == damaged and not list(tmp_path.glob("*.tmp"))


def test_nonfinite_numbers_are_null_and_named(tmp_path):
    tracker = JsonlTracker(tmp_path, -1)
    tracker.log(1, {"a": math.nan, "b": math.inf, "c": np.float32("-inf"), "d": 1.0})
    tracker.samples(1, [{"scores": [1.0, math.nan], "meta": {"kl": math.inf}}])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (metrics,) = (json.loads(line, parse_constant=refuse) for line in (tmp_path / METRICS).open())
    assert (metrics["a"], metrics["b"], metrics["c"], metrics["d"]) == (None, None, None, 1.0)
    assert metrics["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    (sample,) = (json.loads(line, parse_constant=refuse) for line in (tmp_path / SAMPLES).open())
    assert sample["scores"] == [1.0, None] and sample["nonfinite"] == {"scores.1": "nan", "meta.kl": "inf"}


def test_values_that_json_does_not_know(tmp_path):
    tracker = JsonlTracker(tmp_path, -1)
    tracker.samples(1, [{"ids": np.arange(3), "reward": np.float64(0.5), "ok": np.bool_(True), "path": tmp_path}])
    (record,) = read_jsonl(tmp_path / SAMPLES)
    assert (record["ids"], record["reward"], record["ok"], record["path"]) == ([0, 1, 2], 0.5, True, str(tmp_path))


@pytest.mark.parametrize("text", ["línea\nzwei", "\u2028 \x85 \x00", "half a pair \ud83d", "數學"])
def test_any_text_comes_back(tmp_path, text):
    tracker = JsonlTracker(tmp_path, -1)
    tracker.samples(1, [{"completion": text}])
    JsonlTracker(tmp_path, 1)
    assert [r["completion"] for r in read_jsonl(tmp_path / SAMPLES)] == [text]


def test_a_directory_that_cannot_be_written_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as caught:
        JsonlTracker(tmp_path / "file" / "run", -1)
    assert caught.value.where == str(tmp_path / "file" / "run")


def test_a_record_file_keeps_what_it_is_told_to(tmp_path):
    path = tmp_path / "folder" / "records.jsonl"
    file = RecordFile(path)
    file.append({"n": n, "text": "\u2028 \ud800 é" * n} for n in range(5))
    assert [r["n"] for r in read_jsonl(path)] == list(range(5)), "before it is closed"
    file.close()
    before = path.read_bytes()
    path.write_bytes(before + before[:9])
    file = RecordFile(path, lambda record: record["n"] < 3)
    assert file.num_dropped == 2 and before.startswith(path.read_bytes())
    file.append([{"n": math.inf}])
    file.sync()
    assert [r["n"] for r in read_jsonl(path)] == [0, 1, 2, None]
    file.close()
    file.close()


def test_a_record_is_found_again_by_its_byte(tmp_path):
    file = RecordFile(tmp_path / "records.jsonl")
    file.append({"n": n, "text": "é\u2028" * n} for n in range(7))
    file.close()
    with (tmp_path / "records.jsonl").open("ab") as torn:
        torn.write(b'{"n": 7')
    with (tmp_path / "records.jsonl").open("rb") as opened:
        for number, (offset, record) in enumerate(iter_located(tmp_path / "records.jsonl")):
            opened.seek(offset)
            assert json.loads(opened.readline()) == record and record["n"] == number
    assert number == 6
