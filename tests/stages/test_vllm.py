"""rollout=vllm as a run: a worker of its own on Ray, whose samples are the policy's at every step."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from llmscale.stages.inspection import inspect
from tests.stages.runs import arguments, records, succeed
from tests.stages.test_lost_roles import Disturbed

pytestmark = pytest.mark.slow
RULE = ["algorithm=grpo", "reward=function", "true_reward=null", "rollout.group_size=4", "training.prompts_per_step=8"]
ON_RAY = [f"cluster.{role}.num_cpus=0.3" for role in ("policy", "reward", "rollout")]


@pytest.fixture(scope="module")
def policy(vllm_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("policy")
    succeed(arguments("pretrain", run_dir, "model.num_heads=1"), run_dir / "log")  # of 32: see docs/rollouts.md
    return run_dir / "demo" / "pretrain"


def test_an_adapted_policy_learns_from_its_samples(policy: Path, tmp_path: Path) -> None:
    """Every step's samples are the merged weights' of that step: the trainer, which adds base and adapter, agrees."""
    lora = ["model.adapter=lora", "model.adapter.rank=4", "optim.lr=0.01", "optim.warmup_steps=0"]
    (tmp_path / "rule.py").write_text("def variety(prompt, completion, fields): return len(set(completion)) / 10")
    rule = [*RULE, f"reward.path={tmp_path}/rule.py:variety"]
    argv = arguments("rlhf", tmp_path, f"model.path={policy}", *rule, *lora, *ON_RAY, "rollout=vllm", "cluster=ray")
    argv = [a for a in argv if a != "cluster=local"] + ["training.num_steps=3"]
    succeed(argv, tmp_path / "log")
    run_dir = tmp_path / "demo" / "rlhf"
    steps = [m for m in records(run_dir / "metrics.jsonl") if "rollout/logprob_diff" in m]
    assert len(steps) == 3 and all(0 < m["rollout/logprob_diff"] < 1e-4 for m in steps)
    assert steps[-1]["kl/ref"] > 1e-4  # the weights have moved
    versions = [s["weight_versions"][-1] for s in records(run_dir / "samples.jsonl")]
    assert sorted(set(versions)) == [0, 1, 2]


def test_a_killed_worker_is_replaced_and_the_account_adds_up(policy: Path, tmp_path: Path) -> None:
    """The new one samples with the weights of the others: the trainer agrees with it at every step."""
    (tmp_path / "rule.py").write_text("def variety(prompt, completion, fields): return len(set(completion)) / 10")
    more = [f"reward.path={tmp_path}/rule.py:variety", "training.num_steps=40", "optim.lr=0.01", "optim.warmup_steps=0"]
    vllm = ["rollout=vllm", "cluster=ray", "cluster.rollout.num_workers=2"]
    run = Disturbed(arguments("rlhf", tmp_path, f"model.path={policy}", *RULE, *ON_RAY, *more, *vllm), tmp_path)
    try:
        run.until_step(3)
        run.signal("rollout-0", signal.SIGKILL)
        run.finish()
    finally:
        run.process.kill()
        run.process.wait()
    assert [(e["where"], e["cause"]) for e in run.events("worker_lost")] == [("rollout 0", "died")]
    assert [e["where"] for e in run.events("worker_replaced")] == ["rollout 0"]
    draws = inspect(run.run_dir)["draws"]
    assert draws["wrong"] == [] and draws["trained"] + draws["dropped"] == draws["ended"] == 40 * 8
    steps = [m for m in run.of("metrics") if "rollout/logprob_diff" in m]
    assert len(steps) == 40 and all(m["rollout/logprob_diff"] < 1e-4 for m in steps)
