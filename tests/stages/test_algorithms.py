"""Every shipped algorithm on the command line: which models it needs, what it logs, and its exact resume."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmscale.compose import compose
from tests.rl.settings import ALGORITHMS, setting
from tests.stages.runs import arguments, kill_when, records, succeed, weights, without_times

RULE = [
    "experiment=grpo",
    "run.name=demo",
    "rollout.group_size=4",
    "training.prompts_per_step=8",
    "training.num_steps=2",
]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_runs_with_the_models_that_it_needs(name: str, chain: Path, tmp_path: Path) -> None:
    succeed(arguments("rlhf", tmp_path, f"model.path={chain}/demo/sft", f"algorithm={name}", *RULE), tmp_path / "log")
    run_dir = tmp_path / "demo" / "rlhf"
    needs = setting(name)
    (pools,) = (e["workers"] for e in records(run_dir / "events.jsonl") if e["kind"] == "pools_up")
    assert ("critic" in pools, "reference" in pools) == (needs.needs_critic, needs.needs_reference)
    for step in records(run_dir / "metrics.jsonl")[1:]:
        assert ("value/explained_var" in step, "kl/ref" in step) == (needs.needs_critic, needs.needs_reference)
        assert all(math.isfinite(value) for value in step.values())
        assert 0 < step["rollout/logprob_diff"] < 1e-4
        assert step["policy/importance"] == 1 and 0 <= step["reward/equal_groups"] <= 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_policy_is_asked_before_an_update_only_where_that_is_needed(name: str) -> None:
    given = ["data.train=any", "model.path=any", "reward.path=any", f"algorithm={name}", "rollout.group_size=8"]

    def asked(*more: str) -> bool:
        sizes = ["training.prompts_per_step=8", "algorithm.global_batch_size=64"]
        return bool(compose("rlhf", [*given, *sizes, *more]).scores_by_policy)

    in_reward = ("ppo", "rloo", "reinforce_pp")  # the KL that is taken off a reward
    assert asked() == (name in in_reward)
    assert asked("algorithm.global_batch_size=32") and asked("algorithm.num_epochs=2")
    assert asked("algorithm.correction=truncated")
    assert asked("training.max_staleness=1"), "samples may be of an older policy"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_correction_is_chosen_where_samples_may_be_stale(name: str) -> None:
    given = ["data.train=any", "model.path=any", "reward.path=any", f"algorithm={name}", "rollout.group_size=8"]

    def chosen(*more: str) -> str:
        return str(compose("rlhf", [*given, *more]).settled_algorithm.correction.value)

    assert chosen() == "none" and chosen("training.max_staleness=2") == "truncated"
    assert chosen("training.max_staleness=2", "algorithm.correction=none") == "none"
    assert chosen("training.max_staleness=2", "algorithm.correction=sequence") == "sequence"


DAPO = ["algorithm=dapo", "algorithm.max_draws=3", *RULE, "training.num_steps=4", "training.save_every_steps=1"]
SOME_ARE_RIGHT = ["reward=regex", "reward.pattern=q"]  # of what a model says that has learned next to nothing
ADAPTIVE = [
    "algorithm.kl_coef=0.1",
    "algorithm.kl_target=1e-4",
    "algorithm.kl_horizon=100",
    "algorithm.kl_place=reward",
]


def test_dynamic_sampling_draws_others_and_resumes_exactly(chain: Path, tmp_path: Path) -> None:
    """Prompts whose samples all got the same reward are replaced; a killed run goes on with the next draw, and with the
    coefficient that it had reached."""
    overrides = [f"model.path={chain}/demo/sft", *DAPO, *ADAPTIVE, *SOME_ARE_RIGHT]
    succeed(arguments("rlhf", tmp_path / "whole", *overrides), tmp_path / "log")
    run_dir = tmp_path / "whole" / "demo" / "rlhf"
    steps = records(run_dir / "metrics.jsonl")[1:]
    samples = records(run_dir / "samples.jsonl")
    assert all(step["reward/equal_groups"] in (0, 1) for step in steps)
    assert any(step["reward/equal_groups"] == 0 for step in steps), (
        "no step of this tiny model found anything to learn from"
    )
    draws = sorted({s["draw_id"] for s in samples})
    assert draws[-1] >= len(draws), "none was passed over"
    assert len({step["kl/coef"] for step in steps}) == len(steps)

    interrupted = arguments("rlhf", tmp_path / "killed", *overrides)
    run_dir = tmp_path / "killed" / "demo" / "rlhf"
    kill_when((run_dir / "checkpoints" / "step-000002").exists, interrupted, tmp_path / "log")
    succeed(interrupted, tmp_path / "log")
    whole = tmp_path / "whole" / "demo" / "rlhf"
    assert without_times(records(run_dir / "metrics.jsonl")) == without_times(records(whole / "metrics.jsonl"))
    assert weights(run_dir) == weights(whole)
