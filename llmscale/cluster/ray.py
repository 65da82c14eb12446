"""Pools of Ray actors, opened: Ray is joined, or started on loopback when no address is given, and every pool gets its place.
Workers die with the driver."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group

from llmscale.cluster import placement
from llmscale.cluster.config import ClusterConfig, PoolConfig
from llmscale.cluster.placement import Group
from llmscale.cluster.pool import Event
from llmscale.cluster.ray_pool import RayPool
from llmscale.cluster.reaper import Reaper
from llmscale.errors import ClusterError

LOOPBACK = "127.0.0.1"
KNOCK_S = 10.0
PATIENCE_S = 3.0  # before it is said for what a pool waits
HOW_TO_JOIN = (
    "Ray must be up there (ray status), this host a part of it (ray start), and RAY_AUTH_MODE and the token those that it "
    "was started with."
)
reapers: list[Reaper] = []  # of the Ray that this process has started


@contextmanager
def opened_ray_pools(
    cluster: ClusterConfig, roles: Mapping[str, Callable[[], Any]], log_dir: str, event: Event
) -> Iterator[dict[str, RayPool]]:
    """Connect to Ray or start it here, reserve the places of every role, and build the roles."""
    pools: dict[str, RayPool] = {}
    try:
        _open(pools, cluster, roles, log_dir, event)
        yield pools
    finally:
        for pool in pools.values():
            pool.close()
        _shut_down()


def _open(
    pools: dict[str, RayPool],
    cluster: ClusterConfig,
    roles: Mapping[str, Callable[[], Any]],
    log_dir: str,
    event: Event,
) -> None:
    configs: dict[str, PoolConfig] = {name: getattr(cluster, name) for name in roles}
    listed = ", ".join(f"{_range(config)} {name}" for name, config in configs.items())
    print(f"starting Ray and its workers: {listed}", file=sys.stderr, flush=True)
    _connect(cluster, configs)
    groups = placement.groups(cluster, roles)
    placement.check(groups, [(n["NodeManagerAddress"], n["Resources"]) for n in ray.nodes() if n["Alive"]])
    for group, place in zip(groups, _reserved(groups, cluster.start_timeout_s), strict=True):
        pools |= {name: RayPool(name, group.share(name), cluster, place, log_dir, event) for name in group.pools}
    for together in placement.start_order(cluster, roles):
        building = [(pools[name], pools[name].start(roles[name])) for name in together]
        for pool, refs in building:
            pool.started(refs)


def _range(config: PoolConfig) -> str:
    return f"{config.fewest} to {config.most}" if config.is_elastic else str(config.num_workers)


def _reserved(groups: Sequence[Group], timeout_s: float) -> list[PlacementGroup | None]:
    """None for elastic pools, whose workers find places one by one, when the others have theirs.

    Raises: ClusterError when somebody else holds what a group needs, and goes on to."""
    places = [
        None if g.any.is_elastic else placement_group([dict(g.place)] * g.size, strategy=g.any.placement.value)
        for g in groups
    ]
    deadline = time.monotonic() + timeout_s
    for group, place in zip(groups, places, strict=True):
        if place is None or place.wait(PATIENCE_S):
            continue
        what = placement.lacking(group, ray.available_resources(), ray.cluster_resources())
        print(f"waiting for {group.where}: {what}", file=sys.stderr, flush=True)
        if not place.wait(max(0.0, deadline - time.monotonic())):
            fix = f"Nothing changed in {timeout_s:g} s (cluster.start_timeout_s). End what runs there, or lower what it needs."
            raise ClusterError(what, where=group.where, fix=fix)
    return places


def _shut_down() -> None:
    """End Ray and every worker that this process started; safe to call when there is none."""
    if ray.is_initialized():
        ray.shutdown()
    while reapers:
        reapers.pop().close()


def _connect(cluster: ClusterConfig, configs: dict[str, PoolConfig]) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "ERROR"}
    if cluster.address is not None:
        try:
            _knock(cluster.address)
            with _own_signals():
                ray.init(address=cluster.address, **quiet)
        except (OSError, ValueError, RuntimeError, RayError) as error:
            what = f"cannot connect to Ray at {cluster.address}: {error}"
            raise ClusterError(what, where="cluster.address", fix=HOW_TO_JOIN) from error
        return
    # On one machine CPUs are shares that we hand out ourselves; GPUs are what is there.
    wanted = sum(c.most * c.num_cpus for c in configs.values())
    with _own_signals():
        ray.init(
            address="local",  # whatever RAY_ADDRESS says
            num_cpus=max(os.cpu_count() or 1, int(-(-wanted // 1))),
            include_dashboard=False,
            _node_ip_address=LOOPBACK,
            **quiet,
        )
    node = ray._private.worker.global_worker.node
    assert node is not None
    reapers.append(Reaper(node.get_session_dir_path()))


@contextmanager
def _own_signals() -> Iterator[None]:
    """ray.init gives SIGTERM a handler of its own, which ends the driver with code 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # that handler, at work
        signal.signal(signal.SIGTERM, ours)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


def _knock(address: str) -> None:
    """Ray would try for minutes. Raises: OSError when nothing listens there."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:  # else `auto` or a form of Ray's own
        socket.create_connection((host, int(port)), timeout=KNOCK_S).close()
