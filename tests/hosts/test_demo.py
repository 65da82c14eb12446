"""The whole demo: on this machine, by vLLM, and with policy, critic and rollouts on three hosts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hosts.commands import Drive, documented, drive_to_end, hosts_of
from tests.hosts.network import Host
from tests.stages.runs import records
from tests.test_readme import recipe, run

pytestmark = [pytest.mark.slow, pytest.mark.hosts]
TAKEN_UP = "model.path=runs/demo/sft reward.path=runs/demo/reward tracking.wandb=disabled"
three_hosts = pytest.mark.parametrize("hosts", [3], indirect=True)


@pytest.fixture(scope="module")
def demo(hosts: Sequence[Host]) -> str:
    """What it printed; its runs are in the hosts' folder."""
    return run(recipe("demo"), hosts[0].folder)


def assert_learned(run_dir: Path) -> None:
    result = json.loads((run_dir / "result.json").read_text())
    before, after = result["before"]["eval/reward/true"], result["metrics"]["eval/reward/true"]
    assert before < 0.6 and after > 0.85  # the README shows 0.449 -> 0.961


@three_hosts
def test_it_learns_what_the_readme_says(demo: str, hosts: Sequence[Host]) -> None:
    assert "Try next" in demo and "over-optimised" not in demo
    assert_learned(hosts[0].folder / "runs" / "demo" / "rlhf")


@three_hosts
def test_it_learns_by_vllm(vllm_installed: None, demo: str, hosts: Sequence[Host]) -> None:
    run(f"llmscale rlhf experiment=demo rollout=vllm run.name=vllm {TAKEN_UP}", hosts[0].folder)
    run_dir = hosts[0].folder / "runs" / "vllm" / "rlhf"
    assert_learned(run_dir)
    assert all(step["rollout/logprob_diff"] < 1e-4 for step in records(run_dir / "metrics.jsonl") if step["step"])


@three_hosts
def test_it_learns_over_three_hosts(demo: str, drive: Drive, hosts: Sequence[Host]) -> None:
    drive_to_end(drive, hosts, f"{documented('Ray')[5][1]} {TAKEN_UP}")
    run_dir = hosts[0].folder / "runs" / "hosts" / "rlhf"
    assert_learned(run_dir)
    places = [hosts_of(run_dir, worker) for worker in ("policy-0", "critic-0", "rollout-0", "rollout-1")]
    assert places == [["node1"], ["node2"], ["node3"], ["node3"]]
