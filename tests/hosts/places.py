"""A driver of a pool whose workers say where they are: `python -m tests.hosts.places`, on a host of a Ray cluster."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from llmscale.cluster.config import Backend, ClusterConfig, Placement, PoolConfig
from llmscale.cluster.pool import opened_pools

NAMES = ("RANK", "LOCAL_RANK", "LOCAL_SIZE", "WORLD_SIZE", "MASTER_ADDR")


class Worker:
    def place(self) -> tuple[str, dict[str, str]]:
        return socket.gethostname(), {name: os.environ[name] for name in NAMES}


if __name__ == "__main__":
    spread = PoolConfig(num_workers=6, num_cpus=0.5, placement=Placement.spread)
    cluster = ClusterConfig(backend=Backend.ray, address="auto", trainer=spread)
    with opened_pools(cluster, {"trainer": Worker}, Path("places")) as pools:
        print(json.dumps(pools["trainer"].call(Worker.place).wait()))
