"""What the cluster cannot give is said at once, and what listens, listens on loopback only."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmscale.cluster.config import Backend, ClusterConfig, Placement, PoolConfig
from llmscale.cluster.environment import set_ray_environment
from llmscale.cluster.placement import Group, check, groups, lacking, start_order
from llmscale.cluster.pool import opened_pools
from llmscale.errors import ClusterError


class Idle:
    """A role of these tests."""

    def pid(self) -> int:
        return os.getpid()


def test_a_role_that_cannot_be_placed_is_named_with_what_it_lacks(tmp_path: Path) -> None:
    cluster = ClusterConfig(backend=Backend.ray, reward=PoolConfig(2, 0.1, resources={"accelerator": 1.0}))
    opened = opened_pools(cluster, {"reward": Idle}, tmp_path)
    with pytest.raises(ClusterError, match="need 2 accelerator, the cluster has 0") as caught, opened:
        pass
    assert caught.value.where == "cluster.reward" and caught.value.exit_code == 3


def test_ray_listens_on_loopback_only_and_leaves_nothing(tmp_path: Path) -> None:
    before = listening()
    with opened_pools(ClusterConfig(backend=Backend.ray), {"reward": Idle}, tmp_path) as pools:
        (worker,) = pools["reward"].call(Idle.pid).wait()
        opened = {address for address in listening() - before}
        assert opened and all(address.startswith(("127.", "::1", "::ffff:127.")) for address in opened), opened
    assert not Path(f"/proc/{worker}").exists()


def listening() -> set[str]:
    """`address:port` of every listening TCP socket on this machine."""
    found = set()
    for file, family, width in (("tcp", socket.AF_INET, 8), ("tcp6", socket.AF_INET6, 32)):
        for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A":
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, width, 8)]
                found.add(f"{socket.inet_ntop(family, b''.join(words))}:{int(port, 16)}")
    return found


def problem(*groups: Group, nodes: list[Mapping[str, float]]) -> str:
    with pytest.raises(ClusterError) as caught:
        check(groups, [(f"10.0.0.{i}", node) for i, node in enumerate(nodes, start=1)])
    return f"{caught.value.where}: {caught.value.what}"


def alone(role: str, *args: Any, **settings: Any) -> Group:
    return Group({role: PoolConfig(*args, **settings)})


def test_what_no_node_has_is_told_node_by_node() -> None:
    four = [{"CPU": 8.0, "GPU": 1.0}] * 4
    told = problem(alone("policy", 2, num_gpus=2.0), nodes=four)
    assert told == (
        "cluster.policy: 2 workers need 1 CPU and 2 GPU each on one node, and there is room for 0 of them: "
        + "; ".join(f"10.0.0.{i} has 8 CPU and 1 GPU" for i in range(1, 5))
    )
    check([alone("policy", 4, num_gpus=1.0)], [("here", node) for node in four])
    assert "10.0.0.6 has 8 CPU and 1 GPU; and 4 nodes more" in problem(
        alone("policy", 2, num_gpus=2.0), nodes=four[:1] * 10
    )
    apart = [{"CPU": 8.0}, {"CPU": 0.5, "GPU": 8.0}]  # enough of each, and never both
    assert "room for 0 of them" in problem(alone("rollout", 2, num_gpus=1.0), nodes=apart)
    three = [{"CPU": 8.0, "GPU": 3.0}] * 2
    assert "3 workers need 1 CPU and 2 GPU each on one node, and there is room for 2" in problem(
        alone("policy", 3, num_gpus=2.0), nodes=three
    )


def test_what_earlier_roles_take_is_gone() -> None:
    nodes = [{"CPU": 2.0, "GPU": 1.0}]
    told = problem(alone("policy", num_gpus=1.0), alone("rollout", num_gpus=1.0), nodes=nodes)
    assert told == "cluster.rollout: 1 workers need 1 GPU, the cluster has 1, 0 left"


def test_shares_add_up_without_rounding() -> None:
    check([alone("reward", 10, 0.1), alone("rollout", 7, 0.1, 1 / 3)], [("here", {"CPU": 1.7, "GPU": 7 / 3})])


def test_colocated_roles_share_a_place_and_its_device() -> None:
    one = PoolConfig(2, 0.5, 1.0, {"left": 1.0})
    cluster = ClusterConfig(Backend.ray, colocated=["policy", "critic", "rollout"], policy=one, critic=one, rollout=one)
    first, second = groups(cluster, ["policy", "critic", "reward", "rollout"])
    assert first.place == {"CPU": 1.5, "left": 3.0, "GPU": 1.0} and first.size == 2
    assert list(second.pools) == ["reward"] and start_order(cluster, ["policy", "critic", "reward", "rollout"]) == [
        ["policy", "reward"],
        ["critic"],
        ["rollout"],
    ]
    shares = [first.share(role).num_gpus for role in first.pools]
    assert sum(shares) == pytest.approx(1, abs=1e-3) and sum(shares) <= 1
    check([first, second], [("here", {"CPU": 4.0, "GPU": 2.0, "left": 6.0})])
    told = problem(first, nodes=[{"CPU": 4.0, "GPU": 1.0, "left": 6.0}])
    assert told == (
        "cluster.colocated: 2 workers of policy and critic and rollout together need 2 GPU, the cluster has 1, 1 left"
    )
    assert len(groups(cluster, ["reward", "rollout"])) == 2, "rollouts that are there alone share with nobody"


def test_what_somebody_else_holds_is_told_with_what_is_free() -> None:
    group, total = alone("rollout", 2, num_gpus=1.0), {"CPU": 8.0, "GPU": 4.0}
    told = lacking(group, {"CPU": 8.0, "GPU": 1.0}, total)
    assert told == "2 workers need 2 CPU and 2 GPU; free are 1 of 4 GPU, for somebody else holds the rest"
    assert "not together" in lacking(group, total, total)


class Sleeper(Idle):
    def place(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


def test_colocated_workers_are_on_one_node_and_a_second_job_is_told_what_the_first_holds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a real cluster of two nodes."""
    set_ray_environment(own_cluster=False)
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"seat": 2}})
    try:
        nodes.add_node(num_cpus=2, resources={"seat": 2})
        nodes.wait_for_nodes()
        pair = PoolConfig(2, 0.5, resources={"seat": 1.0}, placement=Placement.spread)
        config = ClusterConfig(address=nodes.address, colocated=["policy", "rollout"], policy=pair, rollout=pair)
        roles = {"policy": Sleeper, "rollout": Sleeper}
        with opened_pools(config, roles, tmp_path) as pools:
            policy, rollout = (pools[name].call(Sleeper.place).wait() for name in roles)
            assert policy == rollout and len(set(policy)) == 2

        ray.init(address=nodes.address, logging_level="ERROR")
        ray.get(ray.util.placement_group([{"seat": 1.0}], lifetime="detached").ready())  # the first job
        ray.shutdown()
        with pytest.raises(ClusterError) as caught, opened_pools(replace(config, start_timeout_s=4), roles, tmp_path):
            pass
        what = "2 workers of policy and rollout together need 2 CPU and 4 seat; free are 3 of 4 seat"
        assert caught.value.where == "cluster.colocated" and caught.value.what.startswith(what)
        assert f"waiting for cluster.colocated: {what}" in capfd.readouterr().err
    finally:
        nodes.shutdown()
