"""Nodes from a stage's config: who lives where, and what is refused before anything is submitted."""

from __future__ import annotations

import pytest

from llmscale.compose import compose
from llmscale.errors import ConfigError
from llmscale.launch.plan import Plan, plan

RLHF = ["data.train=x", "model.path=m", "reward=answer", "cluster=ray"]
PRETRAIN = ["data.train=x", "engine=deepspeed"]


def planned(stage: str, overrides: list[str], *launch: str) -> Plan:
    return plan(compose(stage, overrides), compose("submit", ["launch=slurm", *launch]).launch)


@pytest.mark.parametrize(("ranks", "nodes", "tasks"), [(1, 1, 1), (8, 1, 8), (8, 2, 4), (8, 8, 1)])
def test_ranks_spread_evenly(ranks: int, nodes: int, tasks: int) -> None:
    gpus = ["cluster=gpus", f"cluster.trainer.num_workers={ranks}"]
    made = planned("pretrain", [*PRETRAIN, *gpus], f"launch.nodes={nodes}")
    assert (made.num_nodes, made.tasks_per_node, made.gpus_per_node) == (nodes, tasks, tasks)
    assert made.places == {"trainer": list(range(nodes))} and not made.on_ray


def test_roles_get_the_nodes_that_they_are_given_and_others_share() -> None:
    workers = ["cluster.policy.num_workers=2", "cluster.policy.num_gpus=4", "cluster.rollout.num_workers=6"]
    more = ["cluster.rollout.num_gpus=1", "algorithm=grpo", "engine=deepspeed"]
    made = planned("rlhf", [*RLHF, *workers, *more], "launch.role_nodes={policy: 2, rollout: 3}")
    assert made.num_nodes == 5 and made.on_ray
    assert made.places["policy"] == [0, 1] and made.places["rollout"] == [2, 3, 4]
    assert made.places["reward"] == [0, 1, 2, 3, 4]
    assert made.resources == [{"policy": 1}, {"policy": 1}, {"rollout": 2}, {"rollout": 2}, {"rollout": 2}]
    assert made.gpus_per_node == 4  # of a policy worker; two rollout workers want less
    assert made.overrides == ["cluster.policy.resources={policy: 1}", "cluster.rollout.resources={rollout: 1}"]


def test_roles_that_share_get_nodes_of_their_own_where_there_are_more() -> None:
    made = planned("rlhf", RLHF, "launch.role_nodes={policy: 1}", "launch.nodes=2")
    assert made.resources == [{"policy": 1}, {}] and made.cpus_per_node == 4  # critic, reference, reward, rollout


def test_a_device_that_roles_share_is_asked_for_once() -> None:
    shared = ["algorithm=grpo", "engine=deepspeed", "cluster.colocated=[policy,rollout]"]
    workers = [f"cluster.{role}.{what}" for role in ("policy", "rollout") for what in ("num_workers=8", "num_gpus=1")]
    assert planned("rlhf", [*RLHF, *shared, *workers], "launch.gpus_per_node=8").gpus_per_node == 8


def test_a_node_holds_what_may_not_be_divided() -> None:
    large = ["cluster.rollout.num_workers=1", "cluster.rollout.num_gpus=4"]
    assert planned("rlhf", [*RLHF, *large], "launch.nodes=2").gpus_per_node == 4
    three = ["cluster.rollout.num_workers=3", "cluster.rollout.num_gpus=2"]
    assert planned("rlhf", [*RLHF, *three], "launch.nodes=2").gpus_per_node == 4


@pytest.mark.parametrize(
    ("stage", "overrides", "launch", "where"),
    [
        (
            "rlhf",
            [*RLHF, "algorithm=grpo", "cluster.colocated=[policy,rollout]"],
            ["launch.role_nodes={policy: 1}"],
            "launch.role_nodes.policy",
        ),
        ("pretrain", [*PRETRAIN, "cluster.trainer.num_workers=3"], ["launch.nodes=2"], "launch.nodes"),
        ("pretrain", PRETRAIN, ["launch.role_nodes={policy: 1}"], "launch.role_nodes"),
        ("pretrain", [*PRETRAIN, "cluster.address=auto"], [], "cluster.address"),
        ("pretrain", [*PRETRAIN, "cluster=gpus"], ["launch.gpus_per_node=4"], "launch.gpus_per_node"),
        ("rlhf", [*RLHF, "algorithm=grpo"], ["launch.role_nodes={critic: 1}"], "launch.role_nodes.critic"),
        ("rlhf", RLHF, ["launch.role_nodes={rollout: 2}"], "launch.role_nodes.rollout"),
        (
            "rlhf",
            [*RLHF, "cluster.policy.resources={a: 1}"],
            ["launch.role_nodes={policy: 1}"],
            "launch.role_nodes.policy",
        ),
        ("rlhf", [*RLHF, "cluster.rollout.num_workers=9"], ["launch.cpus_per_node=2"], "launch.cpus_per_node"),
    ],
)
def test_what_cannot_be_is_refused(stage: str, overrides: list[str], launch: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(stage, overrides, *launch)
    assert caught.value.where == where and caught.value.fix


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("launch.time=soon", "launch.time"),
        ("launch.partition='a b'", "launch.partition"),
        ("launch.extra=['--time=1']", "launch.extra"),
        ("launch.extra=[reservation]", "launch.extra"),
        ("launch.extra=['-N 7']", "launch.extra"),
        ("launch.extra=['--array=0-3']", "launch.extra"),
        ("launch.time=2", "launch.signal_lead_s"),
        ("launch.signal_lead_s=70000", "launch.signal_lead_s"),
        ("launch.role_nodes={polisy: 1}", "launch.role_nodes.polisy"),
        ("launch.container=pyxis", "launch.image"),
        ("launch.nodes=0", "launch.nodes"),
        ("launch.max_retries=-1", "launch.max_retries"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(override: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("submit", ["launch=slurm", override])
    assert caught.value.where == where and caught.value.fix
