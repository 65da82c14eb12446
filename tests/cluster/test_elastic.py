"""Rollout workers that come and go, with the nodes of a real Ray: a node more, a node less, and the last worker killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from llmscale.cluster.config import Backend, ClusterConfig, RolloutPoolConfig, Transport
from llmscale.cluster.environment import set_ray_environment
from llmscale.cluster.placement import Group, check
from llmscale.cluster.pool import opened_pools
from llmscale.errors import ClusterError
from tests.cluster.test_healing import Events, Keeper

PATIENCE_S = 120.0  # on a busy machine
LOOPBACK = {"node_ip_address": "127.0.0.1"}
SEAT = {"seat": 1.0}  # a worker takes one, a node has one


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Any]:
    set_ray_environment(own_cluster=True)  # before Ray is imported
    from ray.cluster_utils import Cluster

    head = LOOPBACK | {"num_cpus": 2, "resources": SEAT, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    yield nodes
    nodes.shutdown()


def configured(nodes: Any, **workers: int) -> ClusterConfig:
    rollout = RolloutPoolConfig(num_cpus=0.5, resources=SEAT, **workers)
    return ClusterConfig(backend=Backend.ray, address=nodes.address, rollout=rollout, start_timeout_s=PATIENCE_S)


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_workers_come_with_nodes_and_go_with_them(ray_nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    events: Events = []
    of = lambda kind: [e for e in list(events) if e["kind"] == kind]  # noqa: E731
    opened = opened_pools(
        configured(ray_nodes, min_workers=1, max_workers=3),
        {"rollout": Keeper},
        tmp_path_factory.mktemp("logs"),
        lambda kind, **details: events.append({"kind": kind, **details}),
    )
    with opened as pools:
        pool = pools["rollout"]
        assert len(pool.members) == 1
        pool.install(Keeper.hold, 1).wait()
        units = pool.units(Keeper.add, [(n, 1) for n in range(40)])
        node = ray_nodes.add_node(num_cpus=2, resources=SEAT, **LOOPBACK)
        wait_until(lambda: len(of("worker_joined")) == 2)
        assert units.wait() == [(n + 100, 1) for n in range(40)]
        pids = pool.call(Keeper.pid).wait()
        assert len(set(pids)) == 2 == len(pool.members) == of("worker_joined")[-1]["workers"]
        pool.install(Keeper.hold, 2).wait()
        assert not of("worker_lost")

        units = pool.units(Keeper.add, [(n, 2) for n in range(40)])
        ray_nodes.remove_node(node, allow_graceful=False)
        assert units.wait() == [(n + 100, 2) for n in range(40)]
        wait_until(lambda: of("worker_left"))
        pool.install(Keeper.hold, 3).wait()  # nobody waits for who has left
        assert [e["workers"] for e in of("worker_left")] == [1]
        (pid,) = pool.call(Keeper.pid).wait()
        assert [d.pid for d in pool.doing()] == [pid], "what Ray has no place for is no sign that anything moves"

        os.kill(pid, signal.SIGKILL)  # below the least: it is waited for, and so is what it has to hold
        pool.install(Keeper.hold, 4).wait()
        assert pool.units(Keeper.add, [(n, 4) for n in range(4)]).wait() == [(n + 100, 4) for n in range(4)]
        assert len(of("worker_joined")) == 3 and len(of("worker_left")) == 1 and len(of("worker_lost")) == 2


def test_only_the_least_have_to_have_places() -> None:
    node = ("here", {"CPU": 8.0} | SEAT)
    check([Group({"rollout": RolloutPoolConfig(max_workers=3, resources=SEAT)})], [node])
    with pytest.raises(ClusterError, match="2 workers need 2 seat, the cluster has 1"):
        check([Group({"rollout": RolloutPoolConfig(min_workers=2, max_workers=3, resources=SEAT)})], [node])


def test_what_needs_a_fixed_set_of_workers_is_refused() -> None:
    gpus = ClusterConfig(backend=Backend.ray, rollout=RolloutPoolConfig(num_gpus=1, max_workers=2))
    gpus.policy.num_gpus = 1
    assert gpus.carried_by is Transport.object_store and not list(gpus.problems())
    told: Mapping[str, Any] = {
        "transport": ClusterConfig(backend=Backend.ray, transport=Transport.broadcast, rollout=gpus.rollout),
        "rollout.max_workers": ClusterConfig(
            backend=Backend.ray, colocated=["policy", "rollout"], rollout=gpus.rollout
        ),
        "rollout.num_workers": ClusterConfig(rollout=RolloutPoolConfig(max_workers=2)),
    }
    for where, cluster in told.items():
        assert where in {path for path, *_ in cluster.problems()}
    assert [path for path, *_ in RolloutPoolConfig(min_workers=3, max_workers=2).problems()] == ["max_workers"]
