"""Contenders that take turns: each is a process of its own (`contenders.py`), or one for each of its ranks, that stands still
until it is told to train a few steps."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.bench.samples import settings

ROOT = Path(__file__).parent.parent.parent
QUIET = {  # one thread, and nothing but the steps: no network, no progress bars
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "WANDB_MODE": "disabled",
    "DS_ACCELERATOR": "cpu",
}


@dataclass(frozen=True, eq=False)
class Contender:
    title: str
    command: tuple[str, ...]  # a function of contenders.py, and its arguments
    targets: Mapping[str, float] = field(default_factory=dict)  # title of a reference -> least ratio
    ranks: int = 1
    packages: Path | None = None  # a folder of packages that come before the installed ones


@dataclass(frozen=True)
class Turn:
    """A few steps of a contender, over all its ranks."""

    tokens: int
    seconds: float
    cpu_seconds: float  # of all threads
    losses: tuple[float, ...]
    peak_bytes: int  # resident, since the first step of all
    start_bytes: int  # resident before that
    parts: Mapping[str, float] = field(default_factory=dict)  # what of it took how many seconds, where that is told

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Running:
    """The processes of a contender. `folder` is what `samples.prepare` filled."""

    def __init__(self, contender: Contender, folder: Path, data: Path):
        self.contender, self.turns = contender, list[Turn]()
        name, *arguments = contender.command
        logs = folder / "logs"
        logs.mkdir(exist_ok=True)
        self._log = logs / f"{len(list(logs.iterdir()))}.log"
        if name == "ours":
            stage, *own = arguments
            model = folder / ("rm" if stage == "reward" else "lm")
            given = [f"model.path={model}", f"run.name={self._log.stem}"]
            own = [setting.format(folder=folder) for setting in own]
            arguments = [stage, *settings(stage, folder, data, contender.ranks), *given, *own]
            name = "ours_rlhf" if stage == "rlhf" else "ours_supervised"
        command = [sys.executable, "-m", "tests.bench.contenders", name, str(folder), *arguments]
        environment = os.environ | QUIET | {"HF_HOME": str(folder / "huggingface")}
        if contender.packages is not None:
            environment["PYTHONPATH"] = str(contender.packages)
        if contender.ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        with self._log.open("w") as log:
            self._ranks = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment | _place(rank, contender.ranks),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
                for rank in range(contender.ranks)
            ]

    def answers(self) -> list[dict[str, Any]]:
        """What each rank says next.

        Raises: RuntimeError with the end of its log when one has ended instead.
        """
        lines = [_pipe(rank.stdout).readline() for rank in self._ranks]
        if not all(lines):
            raise RuntimeError(f"{self.contender.title} has ended:\n{self._log.read_text()[-3000:]}")
        return [json.loads(line) for line in lines]

    def take_turn(self, steps: int) -> None:
        for rank in self._ranks:
            print(steps, file=_pipe(rank.stdin), flush=True)
        answers = self.answers()
        total = {name: sum(a[name] for a in answers) for name in ("tokens", "cpu_seconds", "peak_bytes", "start_bytes")}
        seconds = max(answer["seconds"] for answer in answers)
        first = {"losses": tuple(answers[0]["losses"]), "parts": answers[0]["parts"]}
        self.turns.append(Turn(seconds=seconds, **first, **total))

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()


def measure(
    contenders: tuple[Contender, ...], rounds: int, steps: int, folder: Path, data: Path
) -> dict[Contender, list[Turn]]:
    """`rounds` turns of each, of `steps` steps, another one beginning each round; and a turn before them, to warm up."""
    with ExitStack() as stack:
        running = [stack.enter_context(Running(contender, folder, data)) for contender in contenders]
        for one in running:
            one.answers()  # it has loaded
        for number in range(rounds + 1):
            first = number % len(running)
            for one in running[first:] + running[:first]:
                one.take_turn(steps)
            speeds = ", ".join(f"{one.contender.title} {one.turns[-1].tokens_per_s:,.0f}" for one in running)
            print(f"round {number} of {rounds}, tokens/s: {speeds}", file=sys.stderr, flush=True)
        return {one.contender: one.turns for one in running}


def _place(rank: int, ranks: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
