"""From a stage's config and a launch to nodes: how many, what each of them has to have, and which roles live where."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmscale.cluster.config import PoolConfig
from llmscale.cluster.placement import Group, groups
from llmscale.cluster.placement import shared as colocated
from llmscale.errors import ConfigError
from llmscale.launch.config import KubernetesLaunch, LaunchConfig, NodesLaunch
from llmscale.stages.config import StageConfig, SupervisedConfig

TRAINER = "trainer"


@dataclass(frozen=True)
class Plan:
    """Nodes are numbered from 0. A stage that learns from files has one task for each rank and needs no Ray; any other has
    a Ray over all nodes, with its driver on node 0."""

    stage: str
    on_ray: bool
    workers: dict[str, int]  # role -> how many; of an elastic one, the most
    places: dict[str, list[int]]  # role -> the nodes that it may be on
    num_nodes: int
    tasks_per_node: int
    cpus: list[int]  # of each node
    gpus: list[int]
    resources: list[dict[str, int]]  # of each node of Ray: role -> how many of its workers fit here
    fewest: dict[str, int] = field(default_factory=dict)  # role -> with how many workers it can begin

    @property
    def cpus_per_node(self) -> int:
        """Where all nodes have to be alike."""
        return max(self.cpus)

    @property
    def gpus_per_node(self) -> int:
        return max(self.gpus)

    @property
    def overrides(self) -> list[str]:
        """What the stage has to be told of its places."""
        return [f"cluster.{role}.resources={{{role}: 1}}" for role in self.pinned]

    @property
    def pinned(self) -> list[str]:
        """The roles with nodes of their own."""
        return sorted({role for node in self.resources for role in node})


def plan(config: StageConfig, launch: LaunchConfig) -> Plan:
    """Raises: ConfigError where config and launch do not fit each other."""
    roles = roles_of(config)
    pools: dict[str, PoolConfig] = {role: getattr(config.cluster, role) for role in roles}
    workers = {role: pool.most for role, pool in pools.items()}
    if not isinstance(launch, NodesLaunch):
        places = {role: [0] for role in roles}
        ((cpus, gpus),) = _spread(groups(config.cluster, roles), 1)
        whole = [math.ceil(cpus)], [math.ceil(gpus)]
        return Plan(config.stage, not config.cluster.one_process, workers, places, 1, 1, *whole, [{}])
    if config.cluster.address is not None:
        raise ConfigError(
            "the job starts the processes of its own nodes",
            where="cluster.address",
            fix=f"Leave it out with launch={launch.name}.",
        )
    if isinstance(config, SupervisedConfig):
        return _of_ranks(config, launch)
    fewest = {role: pool.fewest for role, pool in pools.items()}
    return replace(_of_roles(config, launch, pools, workers), fewest=fewest)


def roles_of(config: StageConfig) -> list[str]:
    if isinstance(config, SupervisedConfig):
        return [TRAINER]
    own: list[str] | None = getattr(config, "roles", None)
    return own or ["rollout", *(["reward"] if getattr(config, "reward", None) is not None else [])]


def _of_ranks(config: SupervisedConfig, launch: NodesLaunch) -> Plan:
    if launch.role_nodes:
        fix = "Set launch.nodes, and cluster.trainer.num_workers for all of them together."
        raise ConfigError(f"{config.stage} has ranks, no roles", where="launch.role_nodes", fix=fix)
    nodes, pool = launch.nodes or 1, config.cluster.trainer
    tasks = pool.num_workers // nodes
    if tasks * nodes != pool.num_workers:
        fix = f"Set cluster.trainer.num_workers={max(1, tasks) * nodes} or another multiple of {nodes}."
        raise ConfigError(
            f"{pool.num_workers} ranks do not spread evenly over {nodes} nodes", where="launch.nodes", fix=fix
        )
    cpus = tasks * max(math.ceil(pool.num_cpus), config.cluster.threads_per_worker)
    all_cpus, all_gpus = _given(launch, [cpus] * nodes, [math.ceil(tasks * pool.num_gpus)] * nodes)
    everywhere = {TRAINER: list(range(nodes))}
    ranks = {TRAINER: pool.num_workers}
    return Plan(config.stage, False, ranks, everywhere, nodes, tasks, all_cpus, all_gpus, [{}] * nodes)


def _of_roles(
    config: StageConfig, launch: NodesLaunch, pools: Mapping[str, PoolConfig], workers: dict[str, int]
) -> Plan:
    role_nodes = launch.role_nodes or _a_group_each(config, launch, pools)
    own = sum(role_nodes.values())
    nodes = launch.nodes or max(1, own)
    if not launch.role_nodes and 0 < len(role_nodes) < len(pools):
        nodes += 1  # for the others
    places: dict[str, list[int]] = {}
    resources: list[dict[str, int]] = [{} for _ in range(nodes)]
    cpus, gpus = [0.0] * nodes, [0.0] * nodes
    for role, number in role_nodes.items():
        where = f"launch.role_nodes.{role}"
        if role not in pools:
            raise ConfigError(f"{config.stage} has no {role} here", where=where, fix=f"It has: {', '.join(pools)}.")
        if role in colocated(config.cluster, pools):
            fix = "Leave it out: roles that share their devices are on the nodes that no other role has."
            raise ConfigError(f"{role} has its places together with others", where=where, fix=fix)
        if pools[role].resources:
            fix = f"Leave cluster.{role}.resources out."
            raise ConfigError("the role's resources say already where it runs", where=where, fix=fix)
        if number > workers[role]:
            fix = f"Set it to {workers[role]} or less, or cluster.{role}.num_workers to {number} or more."
            raise ConfigError(f"{workers[role]} workers cannot fill {number} nodes", where=where, fix=fix)
        first = sum(map(len, places.values()))
        places[role] = list(range(first, first + number))
        fit = math.ceil(workers[role] / number)
        for node in places[role]:
            resources[node][role] = fit
            cpus[node], gpus[node] = fit * pools[role].num_cpus, fit * pools[role].num_gpus
    sharing = groups(config.cluster, [role for role in pools if role not in places])
    places |= {role: list(range(nodes)) for role in pools if role not in places}
    # Those that share go where there is room: on nodes without a role first, where there are any.
    free = nodes - own or nodes
    first = own if nodes > own else 0
    for node, (more_cpus, more_gpus) in enumerate(_spread(sharing, free), start=first):
        cpus[node] += more_cpus
        gpus[node] += more_gpus
    all_cpus, all_gpus = _given(launch, [math.ceil(c) or 1 for c in cpus], [math.ceil(g) for g in gpus])
    return Plan(config.stage, True, workers, places, nodes, 1, all_cpus, all_gpus, resources)


def _a_group_each(config: StageConfig, launch: NodesLaunch, pools: Mapping[str, PoolConfig]) -> dict[str, int]:
    """Pods need not be alike: on Kubernetes each role has one of its own where nothing else is said. Colocated ones, and one
    that names resources of the user's, share one."""
    if not isinstance(launch, KubernetesLaunch) or launch.nodes is not None:
        return {}
    together = colocated(config.cluster, pools)
    return {role: 1 for role, pool in pools.items() if role not in together and not pool.resources}


def _given(launch: NodesLaunch, cpus: list[int], gpus: list[int]) -> tuple[list[int], list[int]]:
    """What the launch says of its nodes; where it says nothing, what the workers there ask for."""
    given = {"cpus_per_node": launch.cpus_per_node, "gpus_per_node": launch.gpus_per_node}
    for (name, has), needed in zip(given.items(), (max(cpus), max(gpus)), strict=True):
        if has is not None and has < needed:
            fix = f"Set it to {needed}, take more nodes, or lower what `cluster` asks for."
            raise ConfigError(f"{has} are fewer than the {needed} of a node's workers", where=f"launch.{name}", fix=fix)
    return (
        cpus if launch.cpus_per_node is None else [launch.cpus_per_node] * len(cpus),
        gpus if launch.gpus_per_node is None else [launch.gpus_per_node] * len(gpus),
    )


def _spread(sharing: Iterable[Group], nodes: int) -> list[tuple[float, float]]:
    """CPUs and GPUs of each node when places go, largest first, where least has been put."""
    places = [(g.place.get("GPU", 0.0), g.place.get("CPU", 0.0)) for g in sharing for _ in range(g.any.most)]
    loads = [(0.0, 0.0)] * nodes
    for gpus, cpus in sorted(places, reverse=True):
        least = loads.index(min(loads))
        loads[least] = (loads[least][0] + gpus, loads[least][1] + cpus)
    most = max(loads)[0], max(cpus for _, cpus in loads)  # all alike: which place comes to which node is for Ray to say
    return [(most[1], most[0])] * nodes


def _alike(amounts: list[int]) -> int | list[int]:
    return amounts if len(set(amounts)) > 1 else amounts[0]


def described(plan: Plan, launch: LaunchConfig, config: StageConfig, run_dir: Path) -> dict[str, Any]:
    """What `--dry-run` prints."""
    data, reward = config.data.train, getattr(getattr(config, "reward", None), "path", None)
    files = {"run_dir": str(run_dir), "data.train": data, "model.path": config.model.path}
    return {
        "stage": plan.stage,
        "launch": launch.name,
        "nodes": plan.num_nodes,
        "roles": {role: {"workers": number, "nodes": plan.places[role]} for role, number in plan.workers.items()},
        "per_node": {
            "tasks": plan.tasks_per_node,
            "cpus": _alike(plan.cpus),
            "gpus": _alike(plan.gpus),
            "memory": getattr(launch, "mem_per_node", None),
        },
        "time": getattr(launch, "time", None),
        "files": files | ({"reward.path": reward} if reward else {}),
    }
