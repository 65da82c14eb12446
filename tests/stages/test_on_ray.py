"""The real parts together: Ray pools, DeepSpeed over two ranks, several rollout workers; interrupted in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmscale.stages.inspection import inspect
from tests.conftest import MARKER, ROOT, _left_behind
from tests.stages.runs import arguments, num_lines, records, succeed

TWO_RANKS = ["engine=deepspeed", "cluster.trainer.num_workers=2", "cluster.trainer.num_cpus=0.5"]
POOLS = ["engine=deepspeed", "cluster=ray", "cluster.rollout.num_workers=2", "cluster.policy.num_workers=2"]


def command(argv: list[str], log: Path) -> subprocess.Popen:
    """The command as a user starts it: in a process group of its own."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}  # the default: a token
    return subprocess.Popen(
        [sys.executable, "-m", "llmscale.cli", *argv],
        cwd=ROOT,
        env=own | {"PYTHONPATH": str(ROOT)},
        stdout=log.open("a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def interrupt(argv: list[str], log: Path, condition: Callable[[], bool], how: int) -> float:
    """Interrupt the command once the condition holds; returns the seconds until no process of it was left."""
    process = command(argv, log)
    while not condition():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
    started = time.monotonic()
    if how == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, how)  # as a terminal does: the whole foreground group
    process.wait(60)
    while left := _left_behind():
        assert time.monotonic() - started < 20, left
        time.sleep(0.05)
    return time.monotonic() - started


def finish(argv: list[str], log: Path) -> str:
    assert command(argv, log).wait(400) == 0, log.read_text()
    return log.read_text()


def weight_difference(a: Path, b: Path) -> float:
    """Norm-wise relative difference of two exported models."""
    left, right = (load_file(run / "hf" / "model.safetensors") for run in (a, b))
    assert left.keys() == right.keys()
    squares = [((left[k] - right[k]).double().square().sum(), right[k].double().square().sum()) for k in left]
    return float(torch.stack([s for s, _ in squares]).sum().sqrt() / torch.stack([t for _, t in squares]).sum().sqrt())


@pytest.mark.slow  # ranks resumed are in tests/engine/test_conformance.py, kills in test_resume.py
def test_two_ranks_killed_and_resumed_equal_one_process(chain: Path, tmp_path: Path) -> None:
    assert MARKER.split("=")[0] in os.environ
    longer = ["training.num_steps=100", "optim.lr=1e-4"]
    argv = arguments("sft", tmp_path, f"model.path={chain}/demo/pretrain", *TWO_RANKS, *longer)
    argv = [a for a in argv if a not in ("engine=single", "cluster=local")]
    run_dir, log = tmp_path / "demo" / "sft", tmp_path / "log"
    interrupt(argv, log, lambda: (run_dir / "checkpoints" / "step-000002").exists(), signal.SIGKILL)
    printed = finish(argv, log)
    assert "sft: step" in printed  # progress of the ranks is shown by the driver
    assert any(e["kind"] == "resumed" for e in records(run_dir / "events.jsonl"))

    one = tmp_path / "one"
    succeed(arguments("sft", one, f"model.path={chain}/demo/pretrain", *longer), tmp_path / "one.log")
    reference = one / "demo" / "sft"
    for own, other in zip(records(run_dir / "metrics.jsonl"), records(reference / "metrics.jsonl"), strict=True):
        assert own["train/loss"] == pytest.approx(other["train/loss"], abs=1e-5)
        assert own["train/grad_norm"] == pytest.approx(other["train/grad_norm"], rel=1e-4)
    assert weight_difference(run_dir, reference) < 1e-4


@pytest.mark.slow  # undisturbed, the demo of test_readme.py has the same pools, tests/hosts/test_ray.py the same numbers
def test_rlhf_on_separate_pools_interrupted_killed_and_finished(chain: Path, tmp_path: Path) -> None:
    """Ctrl-C, then kill -9 of the driver, then the end: with the numbers of the undisturbed run in one process."""
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward", "training.num_steps=12"]
    argv = [a for a in arguments("rlhf", tmp_path, *paths, *POOLS) if a not in ("engine=single", "cluster=local")]
    run_dir, log = tmp_path / "demo" / "rlhf", tmp_path / "log"
    latest = run_dir / "checkpoints"
    seconds = interrupt(argv, log, lambda: num_lines(run_dir / "metrics.jsonl") >= 2, signal.SIGINT)
    assert seconds < 10
    assert "the same command resumes" in log.read_text() and "Traceback" not in log.read_text()
    interrupt(argv, log, lambda: (latest / "step-000002").exists(), signal.SIGKILL)
    printed = finish(argv, log)
    assert "KL to the SFT model" in printed

    local = tmp_path / "local"
    succeed(arguments("rlhf", local, *paths), tmp_path / "local.log")
    own, other = (records(d / "metrics.jsonl") for d in (run_dir, local / "demo" / "rlhf"))
    assert [m["step"] for m in own] == [m["step"] for m in other]
    for ours, reference in zip(own[1:], other[1:], strict=True):
        for name in ("reward/mean", "reward/true", "rollout/completion_len", "kl/ref"):
            assert ours[name] == pytest.approx(reference[name], abs=1e-3)
    assert weight_difference(run_dir, local / "demo" / "rlhf") < 1e-3
    versions = [s["weight_versions"][-1] for s in records(run_dir / "samples.jsonl")]
    assert versions == sorted(versions) and len(set(versions)) == 12  # one for each step, none repeated


@pytest.mark.slow  # test_generation.py has many schedules over threads, test_staleness.py the real parts in one process
def test_an_asynchronous_run_killed_and_finished_has_every_draw_once(chain: Path, tmp_path: Path) -> None:
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward", "training.num_steps=10"]
    pools = ["cluster=ray", "cluster.rollout.num_workers=2"]
    argv = arguments("rlhf", tmp_path, *paths, *pools, "training.max_staleness=2", "rollout.unit_size=4")
    argv += ["rollout.on_update=abort", "rollout.max_new_tokens=80", "data.max_seq_len=120"]
    argv.remove("cluster=local")
    run_dir, log = tmp_path / "demo" / "rlhf", tmp_path / "log"
    interrupt(argv, log, lambda: (run_dir / "checkpoints" / "step-000004").exists(), signal.SIGKILL)
    finish(argv, log)
    found = inspect(run_dir)
    draws = found["draws"]
    assert (draws["ended"], draws["trained"], draws["wrong"]) == (10 * 16, 10 * 16, [])
    assert set(draws["staleness"]) <= {0, 1, 2} and draws["staleness"][2] > 0
    made = {(s["draw_id"], s["sample_index"]) for s in records(run_dir / "samples.jsonl")}
    assert len(made) == 10 * 16 and found["attempts"] == 2
    steps = records(run_dir / "metrics.jsonl")[1:]
    assert all(step.get("rollout/logprob_diff", 0) < 1e-4 for step in steps)
    assert any(step.get("rollout/continued", 0) > 0 for step in steps)
