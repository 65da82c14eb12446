"""Pools of workers, one pool a role. A worker is a plain object (a role); a pool calls its methods on several of them.

Methods are named by the function itself, `pool.call(PolicyRole.update, ...)`, never by a string, so that editors and type
checkers follow the call. Every call returns at once with a `Pending`; results come in the order of workers or units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from llmscale.cluster.config import ClusterConfig
from llmscale.cluster.environment import set_ray_environment


class Pending(Protocol):
    """Work that was started."""

    def wait(self) -> list[Any]:
        """Results in order.

        Raises: the worker's own LlmscaleError, or a WorkerError that names role and rank.
        """
        ...


class WorkerPool(Protocol):
    """`num_workers` workers that each hold one role object."""

    num_workers: int

    @property
    def members(self) -> Sequence[str]:
        """Who the workers are: another one in the place of one that died has another name."""
        ...

    def call(self, method: Callable[..., Any], *args: Any) -> Pending:
        """The same call on every worker; one result a worker. Collective methods of roles are called this way."""
        ...

    def map(self, method: Callable[..., Any], items: Sequence[Any]) -> Pending:
        """`method(part)` on every worker with its part of the items, even an empty one; one result an item, in order."""
        ...

    def units(self, method: Callable[..., Any], units: Sequence[Any]) -> Pending:
        """`method(unit)` for each unit on whichever worker is free; one result a unit. What a unit holds must not depend
        on the number of workers: then neither do its results."""
        ...

    def stream(self, method: Callable[..., Any], units: Iterable[Any]) -> Iterator[Any]:
        """The same for more units than memory holds: results one by one, in the order of the units, which are taken as
        workers become free. A unit that takes long holds up results, and in the end work, but never their number."""
        ...


@contextmanager
def opened_pools(
    cluster: ClusterConfig, roles: Mapping[str, Callable[[], Any]], log_dir: Path
) -> Iterator[Mapping[str, WorkerPool]]:
    """One pool for each role while the context is open; afterwards no worker is left. `roles` maps a role's name (a field
    of ClusterConfig) to what builds the role object on a worker.

    Raises: ClusterError when the cluster lacks the resources.
    """
    one_each = all(getattr(cluster, name).num_workers == 1 for name in roles)
    if cluster.one_process and one_each:
        from llmscale.cluster.local import LocalPool

        yield {name: LocalPool(name, build) for name, build in roles.items()}
        return
    set_ray_environment(own_cluster=cluster.address is None)
    from llmscale.cluster.ray import open_ray_pools, shut_down

    try:
        yield open_ray_pools(cluster, roles, str(log_dir.resolve()))
    finally:
        shut_down()
