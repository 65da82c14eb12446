"""A file system that is really full: what can be written again waits, and what waits too long says why."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmscale import disk
from llmscale.checkpoint.run_state import RunState
from llmscale.checkpoint.tensors import save_tensors
from llmscale.cluster import faults
from llmscale.cluster.faults import cannot_fill, filled
from llmscale.disk import explaining_full, is_full, patiently
from llmscale.errors import DiskFullError
from llmscale.tracking.jsonl import JsonlTracker, RecordFile, read_jsonl

BIG = {"weight": torch.zeros(1 << 20)}


class Numbers:
    def state_dict(self):
        return BIG

    def load_state_dict(self, state): ...


def run_state(path: Path) -> None:
    state = RunState()
    state.register("numbers", Numbers())
    path.mkdir()
    state.save(path)


WRITES = {
    "bytes": lambda path: path.write_bytes(bytes(1 << 22)),
    "safetensors": lambda path: save_file(BIG, path),
    "checkpoint": lambda path: save_tensors(path, BIG, {}),
    "run state": run_state,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_whatever_a_library_says_a_full_disk_is_named(small_disk: Path, write) -> None:
    with (
        pytest.raises(DiskFullError, match=f"no space is left on the disk of {small_disk}"),
        explaining_full(small_disk),
    ):
        write(small_disk / "file")
    with pytest.raises(FileNotFoundError), explaining_full(small_disk):
        (small_disk / "other" / "file").write_bytes(b"")


def test_all_that_is_free_is_taken_and_given_back(small_disk: Path) -> None:
    (small_disk / "before").write_bytes(bytes(5000))
    with filled(small_disk) as num_bytes:
        assert 1 << 20 < num_bytes < 2 << 20
        with pytest.raises(OSError) as caught:
            (small_disk / "file").write_bytes(bytes(4096))
        assert is_full(caught.value) and {p.name for p in small_disk.iterdir()} == {"before", "file"}
    (small_disk / "file").write_bytes(bytes(1 << 20))


def test_a_large_disk_is_not_filled(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cannot_fill(small_disk / "run" / "that" / "is not there") is None
    monkeypatch.setattr(faults, "MOST_FILLED_BYTES", 1)
    assert f"the disk of {small_disk} has" in (cannot_fill(small_disk) or "")


def test_records_wait_and_none_is_torn_or_lost(small_disk: Path) -> None:
    tracker = JsonlTracker(small_disk, resume_step=-1)
    long = "x" * 3000
    with filled(small_disk):
        writer = threading.Thread(target=lambda: [tracker.samples(i, [{"text": long, "n": i}]) for i in range(5)])
        writer.start()
        writer.join(2.5)
        assert writer.is_alive(), "it waits"
    writer.join(10)
    tracker.finish("done")
    assert [r["n"] for r in read_jsonl(small_disk / "samples.jsonl")] == list(range(5))
    (event,) = [e for e in read_jsonl(small_disk / "events.jsonl") if e["kind"] == "disk_full"]
    assert event["at"] == "samples.jsonl" and 1 <= event["seconds"] < 20


def test_who_waits_too_long_says_why_and_what_is_torn_is_cut_off(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "PATIENCE_S", 0.1)
    monkeypatch.setattr(disk, "PAUSE_S", 0.1)
    records = RecordFile(small_disk / "records.jsonl")
    records.append([{"n": 0}])
    with filled(small_disk):
        with pytest.raises(DiskFullError, match="No space left on device"):
            records.append([{"n": 1, "text": "x" * 10_000}])
        monkeypatch.setattr(disk, "PATIENCE_S", 60.0)
        started = time.monotonic()
        with pytest.raises(DiskFullError):
            RecordFile(small_disk / "others.jsonl").append([{"n": 1}])
        assert time.monotonic() - started < 10, "nobody waits twice"
    assert not (small_disk / "records.jsonl").read_bytes().endswith(b"\n"), "else there is nothing to cut off"
    RecordFile(small_disk / "records.jsonl").append([{"n": 2}])
    assert [json.loads(line)["n"] for line in (small_disk / "records.jsonl").read_text().splitlines()] == [0, 2]


def test_other_errors_are_not_waited_for(tmp_path: Path) -> None:
    tries = []

    def write() -> None:
        tries.append(1)
        raise PermissionError(13, "no")

    with pytest.raises(PermissionError):
        patiently(write, tmp_path)
    assert len(tries) == 1
