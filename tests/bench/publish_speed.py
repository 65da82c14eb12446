"""How long new weights take from the policy to the rollout workers: 100M parameters in fp32, two workers that sample by
rollout=hf, pools in Ray on one machine.

    python tests/bench/publish_speed.py [--rounds 7] [--workers 2]

Each round publishes (gather, copy, fingerprint, object store, copy, fingerprint on every worker) and copies as many bytes
twice in one thread, in turns.
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

from llmscale.cluster.config import Backend, ClusterConfig, PoolConfig
from llmscale.cluster.pool import opened_pools
from llmscale.cluster.publish import BUCKET_BYTES, receive, send
from llmscale.models.weights import load_buckets
from tests.bench.checkpoint_speed import new_engine


class Sender:
    def __init__(self) -> None:
        self.engine = new_engine()

    def num_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.engine.model.parameters())

    def publish(self) -> list[Any]:
        return send(self.engine.full_parameters(BUCKET_BYTES), torch.float32)


class Receiver:
    def __init__(self) -> None:
        self.model = new_engine().model

    def load_weights(self, handles: list[Any]) -> None:
        load_buckets(self.model, receive(handles), "the benchmark")


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
    arguments = parser.parse_args()
    half = partial(PoolConfig, num_cpus=0.5)
    cluster = ClusterConfig(backend=Backend.ray, policy=half(), rollout=half(num_workers=arguments.workers))
    roles = {"policy": Sender, "rollout": Receiver}
    with tempfile.TemporaryDirectory() as logs, opened_pools(cluster, roles, Path(logs)) as pools:
        (num_bytes,) = pools["policy"].call(Sender.num_bytes).wait()
        rounds = []
        for number in range(arguments.rounds + 1):
            started = time.perf_counter()
            handles = pools["policy"].call(Sender.publish).wait()[0]
            sent = time.perf_counter() - started
            pools["rollout"].call(Receiver.load_weights, handles).wait()
            rounds.append((time.perf_counter() - started, sent, copies_twice(num_bytes)))
            print(
                f"round {number}: published in {rounds[-1][0]:.2f} s, copied twice in {rounds[-1][2]:.2f} s", flush=True
            )
    counted = rounds[1:]  # the first touches memory for the first time
    whole, sent, copied = (median(column) for column in zip(*counted, strict=True))
    ratio = median(a / c for a, _, c in counted)
    print(f"{num_bytes / 1e6:.0f} MB to {arguments.workers} workers: {whole:.2f} s, {sent:.2f} s of it to send")
    print(f"copying as many bytes twice: {copied:.2f} s; ratio {ratio:.1f} (5 wanted)")


if __name__ == "__main__":
    main()
