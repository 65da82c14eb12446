"""What the cluster cannot give is said at once, and what listens, listens on loopback only."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from llmscale.cluster.config import Backend, ClusterConfig, PoolConfig
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
