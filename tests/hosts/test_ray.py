"""Ray over three hosts, as docs/hosts.md says: ranks of one pool on all, policy, critic and rollouts apart, with the numbers of
one."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.hosts.commands import (
    Drive,
    documented,
    drive_to_end,
    driver_log,
    exit_codes,
    hosts_of,
    tiny,
    wait_for,
)
from tests.hosts.network import Host
from tests.stages.runs import TINY, arguments, num_lines, records, succeed
from tests.stages.test_lost_workers import assert_undisturbed
from tests.stages.test_on_ray import weight_difference

pytestmark = [pytest.mark.hosts, pytest.mark.parametrize("hosts", [3], indirect=True)]


def test_policy_critic_and_rollouts_apart_give_the_numbers_of_one_process(
    drive: Drive, hosts: Sequence[Host], chain: Path, tmp_path: Path
) -> None:
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward"]
    short = [*TINY["rlhf"], "tracking.wandb=disabled"]
    # What has to find its way over real addresses; Ray's own store does that in other tests, and by itself.
    short.append("cluster.transport=broadcast")
    drive_to_end(drive, hosts, " ".join([documented("Ray")[5][1], *short, *paths]))
    run = hosts[0].folder / "runs" / "hosts" / "rlhf"
    places = [hosts_of(run, worker) for worker in ("policy-0", "critic-0", "rollout-0", "rollout-1")]
    assert places == [["node1"], ["node2"], ["node3"], ["node3"]]

    succeed(arguments("rlhf", tmp_path, *paths), tmp_path / "log")
    local = tmp_path / "demo" / "rlhf"
    own, other = ([m for m in records(d / "metrics.jsonl") if m["step"]] for d in (run, local))
    for ours, reference in zip(own, other, strict=True):
        for name in ("reward/mean", "reward/true", "rollout/completion_len", "kl/ref"):
            assert ours[name] == pytest.approx(reference[name], abs=1e-3)
    assert weight_difference(run, local) < 1e-3


def test_ranks_of_a_host_follow_each_other_and_know_their_number(drive: Drive, hosts: Sequence[Host]) -> None:
    token = documented("Ray")[4][1].partition("&&")[0]
    printed = drive_to_end(drive, hosts, f"{token} && python -m tests.hosts.places")
    places = json.loads(printed.splitlines()[-1])
    names = [name for name, _ in places]
    assert sorted(names) == [f"node{i // 2 + 1}" for i in range(6)] and names[::2] == names[1::2]
    address = next(host.address for host in hosts if host.name == names[0])
    for rank, (_, place) in enumerate(places):
        own = {"RANK": rank, "LOCAL_RANK": rank % 2, "LOCAL_SIZE": 2, "WORLD_SIZE": 6, "MASTER_ADDR": address}
        assert place == {name: str(value) for name, value in own.items()}


def test_a_driver_that_ray_does_not_let_in_is_told_why(drive: Drive, hosts: Sequence[Host]) -> None:
    command = tiny(documented("Ray")[4][1], "run.name=refused")
    printed = drive_to_end(drive, hosts, command.replace("$PWD/ray-token", "$PWD/no-token"), exit_code=3)
    assert "cluster.address: cannot connect to Ray at node1:6379" in printed and "no-token" in printed
    assert "Traceback" not in printed


def test_a_working_directory_that_another_host_lacks_is_named(drive: Drive, hosts: Sequence[Host]) -> None:
    command = tiny(documented("Ray")[4][1], "run.dir=$OLDPWD/elsewhere")
    command = command.replace("&& llmscale", "&& mkdir /dev/shm/here && cd /dev/shm/here && llmscale")
    printed = drive_to_end(drive, hosts, command, exit_code=3)
    assert re.search(r"cluster: /dev/shm/here does not exist on 10\.0\.0\.[23]", printed)


@pytest.mark.slow  # minutes; workers that are killed and stopped on one machine are in tests/stages/test_lost_roles.py
def test_a_host_that_loses_its_power_takes_nothing_with_it(
    drive: Drive, hosts: Sequence[Host], chain: Path, tmp_path: Path
) -> None:
    """The last test here, for there are fewer hosts then."""
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward"]
    longer = [
        *TINY["rlhf"],
        "training.num_steps=40",
        "training.eval_every_steps=40",
        "tracking.wandb=disabled",
        "engine=single",
    ]
    command = documented("Ray")[5][1].replace("run.name=hosts", "run.name=power")
    command = command.replace("cluster.rollout.num_workers=2", "cluster.rollout.num_workers=3")
    command = command.replace("cluster.rollout.resources='{rollout: 1}'", "cluster.rollout.placement=spread")
    process = drive(" ".join([command, *longer, *paths, "cluster.answer_timeout_s=5"]))
    run = hosts[0].folder / "runs" / "power" / "rlhf"
    wait_for(lambda: num_lines(run / "metrics.jsonl") >= 3, [process], driver_log(hosts))
    assert {place for rank in range(3) for place in hosts_of(run, f"rollout-{rank}")} == {"node1", "node2", "node3"}
    next(host for host in hosts if host.name == "node3").lose_power()
    assert exit_codes([process]) == [0], driver_log(hosts).read_text()
    replaced = [e for e in records(run / "events.jsonl") if e["kind"] == "worker_replaced"]
    assert replaced and all(e["where"].partition(" ")[0] in ("rollout", "reward", "reference") for e in replaced)

    succeed(arguments("rlhf", tmp_path, *paths, *longer), tmp_path / "log")
    assert_undisturbed(run, tmp_path / "demo" / "rlhf")
