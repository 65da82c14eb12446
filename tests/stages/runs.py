"""Running the command line in children of a fork server, which imports torch once, so that a run costs a second. Not in
forks of the tests' own process: DeepSpeed maps so much memory into that one that it cannot be forked any more.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["llmscale.stages.rlhf_run", "llmscale.stages.supervised_run", "llmscale.stages.use"])

TINY = {
    "pretrain": [
        "model.hidden_size=32",
        "model.intermediate_size=64",
        "model.num_layers=1",
        "model.num_heads=4",
        "training.num_steps=6",
        "data.max_records=500",
    ],
    "sft": ["training.num_steps=6", "data.max_records=200"],
    "reward": ["training.num_steps=6", "optim.lr=3e-4", "data.max_records=100", "data.validation=null"],
    "rlhf": [
        "optim.lr=1e-4",
        "critic.optim.lr=3e-4",
        "training.num_steps=5",
        "training.prompts_per_step=16",
        "algorithm.global_batch_size=16",
        "rollout.unit_size=8",
        "data.validation='task:sorting/test?size=16'",
    ],
}
SAVE_OFTEN = ["training.save_every_steps=2", "training.eval_every_steps=3"]
DEADLINE_S = 400.0  # these machines are slow when they are shared


def arguments(stage: str, run_dir: Path, *overrides: str) -> list[str]:
    """A stage of the demo, made tiny."""
    common = ["experiment=demo", f"run.dir={run_dir}", "tracking.wandb=disabled", "engine=single", "cluster=local"]
    return [stage, *common, *TINY[stage], *SAVE_OFTEN, *overrides]


def from_chain(stage: str, chain: Path) -> list[str]:
    """Overrides that take earlier stages from the finished chain."""
    earlier = {"pretrain": [], "sft": ["pretrain"], "reward": ["sft"], "rlhf": ["sft", "reward"]}[stage]
    paths = ("model.path", "reward.path")
    return [f"{path}={chain}/demo/{name}" for path, name in zip(paths, earlier, strict=False)]


def pipeline(run_dir: Path, *overrides: str) -> list[str]:
    common = ["experiment=demo", f"run.dir={run_dir}", "tracking.wandb=disabled", "engine=single", "cluster=local"]
    tiny = [f"{stage}.{o}" for stage, own in TINY.items() for o in [*own, *SAVE_OFTEN]]
    return ["pipeline", *common, *tiny, *overrides]


def start(argv: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    child = SERVER.Process(target=_run, args=(argv, log))
    child.start()
    return child


def run(argv: list[str], log: Path) -> int:
    """The exit code of the command; what it printed is in `log`."""
    child = start(argv, log)
    child.join(DEADLINE_S)
    assert child.exitcode is not None, f"still running after {DEADLINE_S} s: {log.read_text()}"
    return child.exitcode


def succeed(argv: list[str], log: Path) -> str:
    assert run(argv, log) == 0, log.read_text()
    return log.read_text()


def kill_when(condition: Callable[[], bool], argv: list[str], log: Path, how: int = signal.SIGKILL) -> int:
    """Start the command, send it a signal as soon as the condition holds, and return its exit code."""
    child = start(argv, log)
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert child.is_alive(), f"it ended too early: {log.read_text()}"
        assert time.monotonic() < deadline, f"waited for too long: {log.read_text()}"
        time.sleep(0.005)
    assert child.pid is not None
    os.kill(child.pid, how)
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def num_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "hf" / "model.safetensors").read_bytes()


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must be the same in two runs that did the same."""
    return [{k: v for k, v in m.items() if not k.startswith(("tim", "perf/"))} for m in metrics]


def _run(argv: list[str], log: Path) -> None:
    import torch

    from llmscale.cli import main

    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w") for fd in (1, 2))  # pytest had its own
    main(argv)
