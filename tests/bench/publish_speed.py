"""How long new weights take from the policy to the rollout workers: 100M parameters in fp32, two workers that sample by
rollout=hf, pools in Ray on one machine.

    python tests/bench/publish_speed.py [--rounds 7] [--workers 2] [--transport object_store file broadcast]

Each round publishes by each transport (gather, fingerprint, the way itself, fingerprint, copy and fingerprint on every worker)
and copies as many bytes twice in one thread, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from llmscale.cluster.config import Backend, ClusterConfig, PoolConfig, Transport
from llmscale.cluster.pool import opened_pools
from llmscale.cluster.publish import BUCKET_BYTES, Publisher
from llmscale.cluster.transports import new_carrier
from llmscale.models.weights import load_buckets
from tests.bench.checkpoint_speed import new_engine

COPIED = "copied twice"
IN_RAY = [Transport.object_store.value, Transport.file.value, Transport.broadcast.value]


class Worker:
    def use(self, cluster: ClusterConfig, folder: str) -> None:
        self.carrier = new_carrier(cluster, Path(folder))


class Sender(Worker):
    def __init__(self) -> None:
        self.engine = new_engine()

    def num_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.engine.model.parameters())

    def publish(self, version: int, meeting: Any) -> Any:
        return self.carrier.send(version, self.engine.full_parameters(BUCKET_BYTES), torch.float32, meeting)


class Receiver(Worker):
    def __init__(self) -> None:
        self.model = new_engine().model

    def load_weights(self, version: int, parcel: Any) -> None:
        load_buckets(self.model, self.carrier.receive(version, parcel), "the benchmark")


def copies_twice(num_bytes: int) -> float:
    """Seconds, into memory that has been touched before."""
    source = np.ones(num_bytes, dtype=np.uint8)
    targets = [np.zeros_like(source) for _ in range(2)]
    started = time.perf_counter()
    for target in targets:
        np.copyto(target, source)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how long new weights take to the rollout workers.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--transport", nargs="+", choices=IN_RAY, default=IN_RAY)
    arguments = parser.parse_args()
    half = partial(PoolConfig, num_cpus=0.5)
    pools_of = partial(ClusterConfig, Backend.ray, policy=half(), rollout=half(num_workers=arguments.workers))
    roles = {"policy": Sender, "rollout": Receiver}
    with tempfile.TemporaryDirectory() as folder, opened_pools(pools_of(), roles, Path(folder) / "logs") as pools:
        policy, rollout = pools["policy"], pools["rollout"]
        (num_bytes,) = policy.call(Sender.num_bytes).wait()

        def publish(transport: str) -> float:
            """Seconds."""
            cluster = pools_of(transport=Transport(transport))
            for pool in (policy, rollout):
                pool.call(Worker.use, cluster, folder).wait()
            publisher = Publisher(cluster, Path(folder))
            publisher.publish(policy, Sender.publish, rollout, Receiver.load_weights)  # a broadcast's members meet
            started = time.perf_counter()
            publisher.publish(policy, Sender.publish, rollout, Receiver.load_weights)
            publisher.wait()
            return time.perf_counter() - started

        rounds = []
        for number in range(arguments.rounds + 1):
            rounds.append({t: publish(t) for t in arguments.transport} | {COPIED: copies_twice(num_bytes)})
            print(f"round {number}: " + ", ".join(f"{name} {s:.2f} s" for name, s in rounds[-1].items()), flush=True)
    counted = rounds[1:]  # the first touches memory for the first time
    print(f"{num_bytes / 1e6:.0f} MB to {arguments.workers} workers, medians of {len(counted)} rounds:")
    for name in counted[0]:
        times = [r[name] for r in counted]
        ratio = median(r[name] / r[COPIED] for r in counted)
        print(
            f"{name}: {median(times):.2f} s ({min(times):.2f} to {max(times):.2f}), {ratio:.1f} times the copies (5 wanted)"
        )


if __name__ == "__main__":
    main()
