"""Ray over two hosts, as docs/hosts.md says: ranks of one pool on both, policy and rollouts apart, with the numbers of one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.hosts.commands import assert_same_numbers, documented, exit_codes, tiny, wait_for
from tests.hosts.network import Host
from tests.stages.runs import TINY, arguments, records, succeed
from tests.stages.test_on_ray import weight_difference

pytestmark = [pytest.mark.hosts, pytest.mark.slow]
Drive = Callable[[str, int], str]


@pytest.fixture(scope="module")
def drive(hosts: Sequence[Host]) -> Drive:
    """Runs a driver's command on node1, while Ray runs over both hosts; returns what it printed."""
    by_name = {host.name: host for host in hosts}
    token, *nodes = documented("Ray")[:3]
    folder = hosts[0].folder
    assert exit_codes([by_name["node1"].start(token[1], folder / "token.log")]) == [0]
    assert (folder / "ray-token").stat().st_mode & 0o077 == 0
    logs = [folder / f"ray-{name}.log" for (name,), _ in nodes]
    started = [by_name[name].start(command, log) for ((name,), command), log in zip(nodes, logs, strict=True)]
    for log in logs:
        wait_for(lambda log=log: "will now block" in log.read_text(), started, log)

    def drive(command: str, exit_code: int) -> str:
        log = folder / "driver.log"
        log.unlink(missing_ok=True)
        code = exit_codes([by_name["node1"].start(command, log)])
        assert code == [exit_code], log.read_text()
        return log.read_text()

    return drive


def host_of(run: Path, worker: str) -> str:
    """As the first line of its log says."""
    first = (run / "attempts" / "1" / f"{worker}.log").read_text().partition("\n")[0]
    return re.findall(r"on (\S+) \(10\.0\.0\.\d\)", first)[0]


def test_a_rank_on_each_host_gives_the_numbers_of_one_host(drive: Drive, hosts: Sequence[Host], one_host: Path) -> None:
    drive(tiny(documented("Ray")[3][1]), 0)
    run = hosts[0].folder / "runs" / "hosts" / "pretrain"
    assert {host_of(run, f"trainer-{rank}") for rank in (0, 1)} == {"node1", "node2"}
    assert_same_numbers(run, one_host)


def test_policy_and_rollouts_apart_give_the_numbers_of_one_process(
    drive: Drive, hosts: Sequence[Host], chain: Path, tmp_path: Path
) -> None:
    paths = [f"model.path={chain}/demo/sft", f"reward.path={chain}/demo/reward"]
    drive(" ".join([documented("Ray")[4][1], *TINY["rlhf"], *paths, "tracking.wandb=disabled"]), 0)
    run = hosts[0].folder / "runs" / "hosts" / "rlhf"
    assert [host_of(run, worker) for worker in ("policy-0", "rollout-0", "rollout-1")] == ["node1", "node2", "node2"]

    succeed(arguments("rlhf", tmp_path, *paths), tmp_path / "log")
    local = tmp_path / "demo" / "rlhf"
    own, other = ([m for m in records(d / "metrics.jsonl") if m["step"]] for d in (run, local))
    for ours, reference in zip(own, other, strict=True):
        for name in ("reward/mean", "reward/true", "rollout/completion_len", "kl/ref"):
            assert ours[name] == pytest.approx(reference[name], abs=1e-3)
    assert weight_difference(run, local) < 1e-3


def test_a_driver_that_ray_does_not_let_in_is_told_why(drive: Drive) -> None:
    command = tiny(documented("Ray")[3][1], "run.name=refused")
    printed = drive(command.replace("$PWD/ray-token", "$PWD/no-token"), 3)
    assert "cluster.address: cannot connect to Ray at node1:6379" in printed and "no-token" in printed
    assert "Traceback" not in printed


def test_a_working_directory_that_another_host_lacks_is_named(drive: Drive) -> None:
    command = tiny(documented("Ray")[3][1], "run.dir=$OLDPWD/elsewhere")
    printed = drive(command.replace("&& llmscale", "&& mkdir /dev/shm/here && cd /dev/shm/here && llmscale"), 3)
    assert "cluster: /dev/shm/here does not exist on 10.0.0.2" in printed
