"""Ranks in Ray actors that are killed, stopped, or whose driver is told to stop: the command ends by itself, with the
weights of an undisturbed run, and leaves no process behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import _left_behind
from tests.stages.ranks import ranks_arguments
from tests.stages.runs import DEADLINE_S, num_lines, records, weights, without_times
from tests.stages.test_on_ray import TWO_RANKS, command


def on_ray(chain: Path, folder: Path, *more: str) -> list[str]:
    return [a for a in ranks_arguments(chain, folder, *TWO_RANKS, *more) if a != "cluster=local"]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def pid_of(run_dir: Path, rank: int) -> int | None:
    try:
        return json.loads((run_dir / ".ranks" / f"rank-{rank:05d}.json").read_text())["pid"]
    except FileNotFoundError:
        return None


def assert_undisturbed(run_dir: Path, undisturbed: Path) -> None:
    own, other = (without_times(records(d / "metrics.jsonl")) for d in (run_dir, undisturbed))
    assert own == other
    assert weights(run_dir) == weights(undisturbed)


def assert_nothing_left() -> None:
    deadline = time.monotonic() + 60
    while left := _left_behind():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.slow  # tests/hosts/test_torchrun.py has a host that dies
def test_a_killed_and_a_stuck_rank_are_replaced(chain: Path, undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 of rank 1, then SIGSTOP of the next rank 1."""
    run_dir, log = tmp_path / "demo" / "sft", tmp_path / "log"
    metrics = run_dir / "metrics.jsonl"
    process = command(on_ray(chain, tmp_path, "cluster.stall_timeout_s=10"), log)
    wait_until(lambda: num_lines(metrics) >= 6 and pid_of(run_dir, 1) is not None, process, log)
    first = pid_of(run_dir, 1)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    events = run_dir / "events.jsonl"
    lost = lambda: [e for e in records(events) if e["kind"] == "worker_lost"]  # noqa: E731
    wait_until(lambda: len(lost()) == 1, process, log)
    resumed_at = num_lines(metrics)
    wait_until(lambda: pid_of(run_dir, 1) not in (None, first) and num_lines(metrics) > resumed_at, process, log)
    second = pid_of(run_dir, 1)
    assert second is not None
    os.kill(second, signal.SIGSTOP)
    assert process.wait(DEADLINE_S) == 0, log.read_text()
    assert_nothing_left()
    killed, stuck = lost()
    assert (killed["where"], killed["why"]) == ("trainer 1", "this worker died")
    assert stuck["where"] == "trainer 0" and "trainer 0: nothing has moved for" in stuck["said"]
    (stalled,) = [e for e in records(events) if e["kind"] == "stalled"]
    assert f"trainer 1 (pid {second} on " in stalled["why"] and "has been silent for" in stalled["why"]
    assert_undisturbed(run_dir, undisturbed)


@pytest.mark.slow  # test_ranks_stopped.py and test_stopping.py have the signal, the test above the resumed ranks
def test_a_signal_to_the_driver_saves_in_its_workers(chain: Path, undisturbed: Path, tmp_path: Path) -> None:
    run_dir, log = tmp_path / "demo" / "sft", tmp_path / "log"
    process = command(on_ray(chain, tmp_path), log)
    wait_until(lambda: num_lines(run_dir / "metrics.jsonl") >= 3, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 75, log.read_text()
    assert "stopped and saved at step" in log.read_text() and "Traceback" not in log.read_text()
    assert_nothing_left()
    process = command(on_ray(chain, tmp_path), log)
    assert process.wait(DEADLINE_S) == 0, log.read_text()
    assert_undisturbed(run_dir, undisturbed)


def test_what_the_user_did_is_not_tried_again(chain: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = command(on_ray(chain, tmp_path, "optim.lr=1e30", "training.max_rollbacks=0"), log)
    assert process.wait(DEADLINE_S) == 1
    assert "error: optim.lr: step" in log.read_text() and log.read_text().count("starting Ray") == 1
    assert_nothing_left()
