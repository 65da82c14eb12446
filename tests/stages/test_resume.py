"""Interrupted + resumed = uninterrupted, bit for bit, and nothing is lost whichever stage is killed."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.stages.runs import (
    arguments,
    from_chain,
    kill_when,
    num_lines,
    pipeline,
    records,
    succeed,
    weights,
    without_times,
)

STAGES = ("pretrain", "sft", "reward", "rlhf")
# Long enough that a kill comes before the end on a busy machine too.
NUM_STEPS = {"pretrain": 40, "sft": 60, "reward": 40, "rlhf": 10}
# What keeps a state of its own besides weights, optimizer and position: an average of the weights, a coefficient that adapts.
STATEFUL = {"rlhf": ["optim.ema_decay=0.9", "algorithm.kl_target=1", "algorithm.kl_horizon=200"]}


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_continues_as_if_nothing_had_happened(stage: str, chain: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    overrides = [*from_chain(stage, chain), f"training.num_steps={NUM_STEPS[stage]}", *STATEFUL.get(stage, [])]
    succeed(arguments(stage, whole, *overrides), tmp_path / "whole.log")
    argv = arguments(stage, killed, *overrides)
    metrics = killed / "demo" / stage / "metrics.jsonl"
    at = random.Random(stage).randint(1, NUM_STEPS[stage] // 3)
    assert kill_when(lambda: num_lines(metrics) >= at, argv, tmp_path / "killed.log") == -signal.SIGKILL
    assert not (killed / "demo" / stage / "result.json").exists()

    succeed(argv, tmp_path / "resumed.log")

    own, other = (run / "demo" / stage for run in (killed, whole))
    assert weights(own) == weights(other)
    assert without_times(records(metrics)) == without_times(records(other / "metrics.jsonl"))
    if stage == "rlhf":
        same = ("draw_id", "sample_index", "token_ids", "rollout_logprobs", "reward")
        rows = [[{k: r[k] for k in same} for r in records(run / "samples.jsonl")] for run in (own, other)]
        assert rows[0] == rows[1]
        steps = [r for r in records(metrics) if "kl/coef" in r]
        assert len({r["kl/coef"] for r in steps}) == len(steps) == NUM_STEPS[stage]  # it did adapt


def test_a_pipeline_killed_in_every_stage_finishes_by_the_same_command(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    longer = [f"{stage}.training.num_steps={steps}" for stage, steps in NUM_STEPS.items()]
    succeed(pipeline(whole, *longer), tmp_path / "whole.log")
    for stage in STAGES:
        metrics = killed / "demo" / stage / "metrics.jsonl"
        code = kill_when(lambda m=metrics: num_lines(m) >= 3, pipeline(killed, *longer), tmp_path / f"{stage}.log")
        assert code == -signal.SIGKILL
    printed = succeed(pipeline(killed, *longer), tmp_path / "last.log")
    assert weights(killed / "demo" / "rlhf") == weights(whole / "demo" / "rlhf")
    assert "held-out true score" in printed and "llmscale chat" in printed


def test_ctrl_c_leaves_a_resumable_run(chain: Path, tmp_path: Path) -> None:
    argv = arguments("sft", tmp_path, *from_chain("sft", chain), f"training.num_steps={NUM_STEPS['sft']}")
    metrics = tmp_path / "demo" / "sft" / "metrics.jsonl"
    assert kill_when(lambda: num_lines(metrics) >= 3, argv, tmp_path / "log", signal.SIGINT) == 130
    assert "the same command resumes" in (tmp_path / "log").read_text()
    assert records(tmp_path / "demo" / "sft" / "events.jsonl")[-1]["status"] == "interrupted"
    succeed(argv, tmp_path / "log")
    resumed = [e for e in records(tmp_path / "demo" / "sft" / "events.jsonl") if e["kind"] == "resumed"]
    assert resumed and resumed[-1]["step"] >= 2


def test_a_finished_run_gives_its_result_again_and_trains_nothing(chain: Path) -> None:
    before = (chain / "demo" / "sft" / "metrics.jsonl").read_bytes()
    printed = succeed(arguments("sft", chain), chain / "again.log")
    assert "validation loss" in printed
    assert (chain / "demo" / "sft" / "metrics.jsonl").read_bytes() == before


def test_a_broken_checkpoint_is_passed_over_and_named(chain: Path, tmp_path: Path) -> None:
    argv = arguments("sft", tmp_path, *from_chain("sft", chain), f"training.num_steps={NUM_STEPS['sft']}")
    run_dir = tmp_path / "demo" / "sft"
    kill_when(lambda: (run_dir / "checkpoints" / "step-000004").exists(), argv, tmp_path / "log")
    newest = max((run_dir / "checkpoints").glob("step-*"))
    model = next(newest.glob("state-*.safetensors"))
    model.write_bytes(model.read_bytes()[:-1])
    succeed(argv, tmp_path / "log")
    skipped = [e for e in records(run_dir / "events.jsonl") if e["kind"] == "checkpoint_skipped"]
    assert newest.name in skipped[0]["path"] and "bytes instead of" in skipped[0]["why"]
