"""The command on two ranks with gloo, in processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT
from tests.stages.runs import DEADLINE_S, arguments, from_chain


def ranks_arguments(chain: Path, run_dir: Path, *overrides: str) -> list[str]:
    """SFT on them, long enough that something can happen to them."""
    longer = ["training.num_steps=60", "training.save_every_steps=4", "engine=deepspeed"]
    argv = arguments("sft", run_dir, *from_chain("sft", chain), *longer, *overrides)
    return [a for a in argv if a != "engine=single"]


class Ranks:
    """The command on two ranks, as torchrun starts them."""

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
            self.kill()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.005)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)
