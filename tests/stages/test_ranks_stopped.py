"""Two ranks with gloo, as torchrun starts them: one of them is told to stop, and all of them do, at the same step."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.stages.runs import DEADLINE_S, arguments, num_lines, records, weights, without_times
from tests.stages.test_resume import from_chain

pytestmark = pytest.mark.slow


class Ranks:
    """The command on two ranks."""

    def __init__(self, argv: list[str], folder: Path):
        self.logs = [folder / f"rank-{rank}.log" for rank in range(2)]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        size = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "PYTHONPATH": str(ROOT)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "llmscale.cli", *argv],
                cwd=ROOT,
                env=os.environ | group | size | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log.open("a"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(self.logs)
        ]

    def wait(self) -> list[int]:
        try:
            return [process.wait(DEADLINE_S) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """Kill all of them as soon as the condition holds."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)
        for process in self.processes:
            process.kill()
        self.wait()

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


def test_all_ranks_stop_at_the_step_that_one_was_told(chain: Path, tmp_path: Path) -> None:
    """Rank 1 alone gets the signal; then the stopped run equals an undisturbed one, bit for bit."""
    rare = ["training.num_steps=40", "training.save_every_steps=1000", "engine=deepspeed"]
    argvs = {
        name: [a for a in arguments("sft", tmp_path / name, *from_chain("sft", chain), *rare) if a != "engine=single"]
        for name in ("whole", "stopped")
    }
    whole = Ranks(argvs["whole"], tmp_path)
    assert whole.wait() == [0, 0], whole.said()

    run_dir, reference = (tmp_path / name / "demo" / "sft" for name in ("stopped", "whole"))
    ranks = Ranks(argvs["stopped"], tmp_path)
    deadline = time.monotonic() + DEADLINE_S
    while num_lines(run_dir / "metrics.jsonl") < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    ranks.processes[1].send_signal(signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.said()
    steps = [re.search(r"^stopped and saved at step (\d+);", log.read_text(), re.MULTILINE) for log in ranks.logs]
    assert all(steps) and len({step[1] for step in steps if step}) == 1
    assert (run_dir / "checkpoints" / f"step-{int(steps[0][1]):06d}").exists()  # type: ignore[index]

    resumed = Ranks(argvs["stopped"], tmp_path)
    assert resumed.wait() == [0, 0], resumed.said()
    assert weights(run_dir) == weights(reference)
    own, other = (without_times(records(d / "metrics.jsonl")) for d in (run_dir, reference))
    assert own == other
