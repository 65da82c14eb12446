from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time

import pytest

from llmscale.tracking.console import ConsoleTracker


def test_without_a_terminal_first_and_last_step_only(capsys):
    tracker = ConsoleTracker(3600, title="sft demo", total_steps=50)
    for step in range(1, 51):
        tracker.log(step, {"train/loss": 2.0 / step, "optim/lr": 1e-4})
    tracker.finish("done")
    out, err = capsys.readouterr()
    first, last, end = err.splitlines()
    assert out == ""
    assert first == "sft demo: step 1/50  train/loss 2"
    assert re.fullmatch(r"sft demo: step 50/50  \S+ steps/s  train/loss 0.04", last)
    assert re.fullmatch(r"sft demo: done at step 50/50 after 0:00:0\d  train/loss 0.04", end)


def test_a_line_every_so_often_with_rate_and_time_left(capsys):
    tracker = ConsoleTracker(0.05, title="t", total_steps=1000)
    begin = time.monotonic()
    for step in range(1, 21):
        tracker.log(step, {})
        time.sleep(0.01)
    elapsed_s = time.monotonic() - begin
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 1 + elapsed_s / 0.05
    shown, rate, hours, minutes, seconds = re.fullmatch(
        r"t: step (\d+)/1000  (\S+) steps/s  (\d+):(\d+):(\d+) left", lines[-1]
    ).groups()
    left_s = int(hours) * 3600 + int(minutes) * 60 + int(seconds)
    assert 19 / elapsed_s * 0.5 <= float(rate) <= 101
    assert left_s == pytest.approx((1000 - int(shown)) / float(rate), abs=1)


def test_a_resumed_run_is_not_credited_with_earlier_steps(capsys):
    tracker = ConsoleTracker(0, title="t", total_steps=2000)
    tracker.log(1000, {})
    time.sleep(0.1)
    tracker.log(1001, {})
    rate = re.search(r"(\S+) steps/s", capsys.readouterr().err.splitlines()[-1])
    assert float(rate.group(1)) <= 10


def test_headline_has_a_fixed_order_and_keeps_the_latest_of_each(capsys):
    tracker = ConsoleTracker(0, title="t", total_steps=9)
    tracker.log(1, {"perf/tokens_per_s": 12345.6, "kl/ref": 0.0123456, "reward/true": 1.0, "reward/mean": 0.5})
    tracker.log(1, {"eval/loss": 3.0})
    tracker.log(2, {"reward/mean": 0.75})
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("eval/loss 3  reward/mean 0.75  reward/true 1  kl/ref 0.01235  perf/tokens_per_s 12,346")


def test_events_are_shown_at_once(capsys):
    tracker = ConsoleTracker(3600, title="t", total_steps=9)
    tracker.event("worker_replaced", role="rollout", rank=3)
    assert capsys.readouterr().err == "t: worker_replaced role=rollout rank=3\n"


def test_ending_before_the_first_step(capsys):
    ConsoleTracker(10, title="t", total_steps=9).finish("failed")
    assert capsys.readouterr().err == "t: failed at no step after 0:00:00\n"


ON_A_TERMINAL = """
from llmscale.tracking.console import ConsoleTracker
tracker = ConsoleTracker(3600, title="sft demo", total_steps=3)
for step in (1, 2, 3):
    tracker.log(step, {"train/loss": 1 / step})
tracker.event("saved", path="[red]x")
tracker.finish("done")
print("result")
"""


def test_on_a_terminal_a_bar_on_stderr_and_only_results_on_stdout():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    out, _ = process.communicate(timeout=60)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # Linux says EIO when the other end is closed
        pass
    finally:
        os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0 and out == b"result\n"
    assert re.search(r"sft demo .*1/3 .*train/loss 1\b", text)
    assert re.search(r"━.*3/3 .*steps/s  train/loss 0.3333", text)
    assert "sft demo: saved path=[red]x" in text
    assert "sft demo: done at step 3/3" in text
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0  # the cursor is back
