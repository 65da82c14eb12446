"""What runs in a pod: the books of an attempt, the exit code that decides over the next one, and leaving."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmscale.checkpoint.commit import CheckpointStore
from llmscale.launch.attempts import all_attempts, cancel_file
from tests.conftest import ROOT
from tests.stages.runs import DEADLINE_S, TINY, num_lines, records

STEP = "import sys; from tests.launch.test_pod import save; save(sys.argv[1], int(sys.argv[2])); sys.exit(int(sys.argv[3]))"
WAITS = """
import fcntl, signal, sys, time
lock = open(sys.argv[1] + "/.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
print("ready", flush=True)
signal.pause()
time.sleep(0.5)
sys.exit(75)
"""
Pod = Callable[..., subprocess.Popen]


def save(run: str, step: int) -> None:
    CheckpointStore(Path(run) / "checkpoints").save(step, lambda folder: (folder / "x").write_text("x") and None)


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    """Starts what a pod runs; `node` is that of a rank, None the driver's."""

    def start(run: Path, *command: str, node: int | None = None, attempt: str = "0", verb: str = "run") -> Any:
        own = {"PET_NODE_RANK": str(node)} if node is not None else {}
        env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "LLMSCALE_JOB": "uid"}
        env |= {"LLMSCALE_START": attempt, "LLMSCALE_POD_LOG": str(tmp_path / "pod.log")} | own
        words = [verb, str(run), *(["2", *command] if verb == "run" else [])]
        return subprocess.Popen(
            [sys.executable, "-m", "llmscale.launch.pod", *words], env=env, text=True, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def test_the_exit_code_says_whether_it_is_to_start_again(pod: Pod, tmp_path: Path) -> None:
    def ended(step: int, code: int) -> int:
        return pod(tmp_path, sys.executable, "-c", STEP, str(tmp_path), str(step), str(code)).wait()

    assert ended(1, 75) == 75  # saved, and further: free
    assert ended(2, 1) == 75  # failed, and further: within the budget of 2
    assert ended(2, 2) == 2  # the config is wrong: it would end the same way
    assert ended(3, 75) == 75
    cancel_file(tmp_path).touch()
    assert ended(4, 75) == 1  # nothing may start it again
    noted = all_attempts(tmp_path)
    assert [noted[n]["exit_code"] for n in sorted(noted)] == [75, 1, 2, 75, 75]
    (tmp_path / "result.json").touch()
    assert ended(5, 1) == 0 and len(all_attempts(tmp_path)) == 5


def test_a_node_that_is_not_the_first_ends_as_that_one_says(pod: Pod, tmp_path: Path) -> None:
    second = pod(tmp_path, "sh", "-c", "echo second; exit 1", node=1, attempt="3")
    first = pod(tmp_path, sys.executable, "-c", STEP, str(tmp_path), "1", "1", node=0, attempt="3")
    assert (first.wait(), second.wait()) == (75, 75)
    (attempt,) = (tmp_path / "attempts").iterdir()
    (log,) = attempt.glob("trainer-*.log")  # of both: here they are on one host
    assert "second" in log.read_text()


def test_a_pod_that_leaves_lets_the_driver_save(pod: Pod, tmp_path: Path) -> None:
    """Asked twice, as by Ray and by Kubernetes, the driver is told once; a pod without a driver waits for it."""
    driver = pod(tmp_path, sys.executable, "-c", WAITS, str(tmp_path))
    assert driver.stdout is not None and driver.stdout.readline() == "ready\n"
    begun = time.monotonic()
    leaving = pod(tmp_path, verb="leave")
    assert driver.stdout.readline() == "asked\n"
    driver.send_signal(signal.SIGTERM)
    assert leaving.wait() == 0 and time.monotonic() - begun > 0.5
    assert driver.wait() == 75 and driver.stdout.read() == ""
    assert (tmp_path / "pod.log").read_text() == "ready\nasked\n"
    assert pod(tmp_path, verb="leave").wait() == 0  # nobody is left


@pytest.mark.slow
def test_two_pods_of_ranks_save_when_asked_and_go_on(pod: Pod, tmp_path: Path) -> None:
    """What a JobSet's pods run, over loopback: torchrun, SIGTERM to each pod, and the same command again."""
    run = tmp_path / "runs" / "demo" / "pretrain"
    torchrun = ["torchrun", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", "--master-port=29517"]
    torchrun += ["--shutdown-timeout=120", "-m", "llmscale.cli", "pretrain", "experiment=demo", *TINY["pretrain"]]
    torchrun += ["engine=deepspeed", "cluster=local", "tracking.wandb=disabled", "training.num_steps=200"]

    def both(attempt: str) -> list[subprocess.Popen]:
        return [pod(run, *torchrun, node=node, attempt=attempt) for node in (0, 1)]

    started = both("0")
    deadline = time.monotonic() + DEADLINE_S
    while num_lines(run / "metrics.jsonl") < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    for each in started:
        each.terminate()
    assert [each.wait() for each in started] == [75, 75]
    assert [each.wait() for each in both("1")] == [0, 0]
    steps = [record["step"] for record in records(run / "metrics.jsonl") if "train/loss" in record]
    assert steps == list(range(1, 201)) and json.loads((run / "result.json").read_text())
