"""Which workers share a place, and whether there are nodes for all of them.

A pool has places of its own, except where roles are colocated: then place i is that of worker i of each of them. A place is on
one node. What a cluster can never give is said at once; what it has and somebody else holds may become free.
A cluster that adds nodes on demand (Ray's autoscaler) has them only when something waits for them: what it has at the start is
all that counts here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmscale.cluster.config import ClusterConfig, PoolConfig
from llmscale.errors import ClusterError

Resources = Mapping[str, float]  # as Ray counts them: CPU, GPU, and names of the user's
SHOWN = 6  # nodes in a message
UNIT = 1e-4  # Ray counts no smaller parts
LOWER = "Lower num_workers or what each worker gets, or add nodes."


@dataclass(frozen=True)
class Group:
    """Pools by role that have their places in common, as many in each; or one pool."""

    pools: Mapping[str, PoolConfig]

    @property
    def where(self) -> str:
        return "cluster.colocated" if len(self.pools) > 1 else f"cluster.{next(iter(self.pools))}"

    @property
    def who(self) -> str:
        colocated = f" of {' and '.join(self.pools)} together" if len(self.pools) > 1 else ""
        return f"{self.size} workers{colocated}"

    @property
    def any(self) -> PoolConfig:
        """In what they have to be alike, they are."""
        return next(iter(self.pools.values()))

    @property
    def size(self) -> int:
        """Places that there have to be."""
        return self.any.fewest

    @property
    def place(self) -> Resources:
        """What one place needs: a device is shared, all else is added up."""
        added: dict[str, float] = defaultdict(float)
        for pool in self.pools.values():
            for name, amount in ({"CPU": pool.num_cpus} | pool.resources).items():
                added[name] += amount
        return {name: amount for name, amount in {**added, "GPU": self.any.num_gpus}.items() if amount}

    @property
    def all_places(self) -> Resources:
        return {name: amount * self.size for name, amount in self.place.items()}

    def share(self, role: str) -> PoolConfig:
        """What Ray is to count for a role: of a shared device its part."""
        pool = self.pools[role]
        return replace(pool, num_gpus=int(pool.num_gpus / len(self.pools) / UNIT) * UNIT)


def groups(cluster: ClusterConfig, roles: Iterable[str]) -> list[Group]:
    """The places of these roles."""
    pools: dict[str, PoolConfig] = {name: getattr(cluster, name) for name in roles}
    together = {name: pools[name] for name in shared(cluster, pools)}
    alone = [Group({name: pool}) for name, pool in pools.items() if name not in together]
    return ([Group(together)] if together else []) + alone


def shared(cluster: ClusterConfig, roles: Iterable[str]) -> list[str]:
    """Those of the roles that are colocated; one that is there without the others is not."""
    there = set(roles)
    found = [name for name in cluster.colocated if name in there]
    return found if len(found) > 1 else []


def start_order(cluster: ClusterConfig, roles: Iterable[str]) -> list[list[str]]:
    """Roles that start at the same time, one lot after another: of those that share a device each finds its memory free."""
    names = list(roles)
    later = shared(cluster, names)[1:]
    return [[name for name in names if name not in later], *([name] for name in later)]


Node = tuple[str, Resources]  # its address, and all that it has, free or not


def check(wanted: Sequence[Group], nodes: Sequence[Node]) -> None:
    """Before anything is waited for.

    Raises: ClusterError naming the first role for which there is no room even on a cluster that nobody else uses.
    """
    total: dict[str, float] = defaultdict(float)
    for _, has in nodes:
        for name, amount in has.items():
            total[name] += amount
    left = total.copy()
    for group in wanted:
        for name, amount in group.all_places.items():
            if amount > left[name] + UNIT:
                what = f"{group.who} need {amount:g} {name}, the cluster has {total[name]:g}, {left[name]:g} left"
                raise ClusterError(what, where=group.where, fix=LOWER)
            left[name] -= amount
        _check_nodes(group, nodes)


def _check_nodes(group: Group, nodes: Sequence[Node]) -> None:
    """Raises: ClusterError where the nodes have enough of everything together, and not each for itself."""
    place = group.place
    room = sum(min(int((has.get(name, 0) + UNIT) / amount) for name, amount in place.items()) for _, has in nodes)
    if room < group.size:
        per_node = [f"{address} has {_listed({name: has.get(name, 0) for name in place})}" for address, has in nodes]
        more = [f"and {len(per_node) - SHOWN} nodes more"] if len(per_node) > SHOWN else []
        what = f"{group.who} need {_listed(place)} each on one node, and there is room for {room} of them: "
        raise ClusterError(what + "; ".join(per_node[:SHOWN] + more), where=group.where, fix=LOWER)


def lacking(group: Group, free: Resources, total: Resources) -> str:
    """What a group waits for that finds no place on a cluster that could hold it."""
    held = [n for n, amount in group.all_places.items() if amount > free.get(n, 0.0) + UNIT]
    if not held:
        return f"{group.who} need {_listed(group.place)} each on one node; that much is free, but not together"
    found = " and ".join(f"{free.get(n, 0):g} of {total.get(n, 0):g} {n}" for n in held)
    return f"{group.who} need {_listed(group.all_places)}; free are {found}, for somebody else holds the rest"


def _listed(resources: Resources) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
