"""From the policy to the rollout workers: versioned weights, a bucket at a time, through Ray's object store where there is
one (numpy arrays there are shared memory, read without a copy) and by hand in one process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmscale.checkpoint.durable import atomic_write_text
from llmscale.models.weights import pack
from llmscale.protocols import WeightBucket

BUCKET_BYTES = 256 << 20  # of gathered weights held at once


def send(buckets: Iterable[Mapping[str, Tensor]], dtype: torch.dtype) -> list[Any]:
    """Put each gathered bucket where receivers find it; returns handles (none on ranks that receive nothing)."""
    in_store = _in_ray()  # which copies what is put there
    return [_put(pack(bucket, dtype, copy=not in_store)) for bucket in buckets if bucket]


def receive(handles: list[Any]) -> list[WeightBucket]:
    return [_get(handle) for handle in handles]


class VersionCounter:
    """Versions that never repeat, over restarts either: the highest one is on disk before it is used."""

    def __init__(self, path: Path):
        self.path = path
        self.value = int(path.read_text()) if path.exists() else 0

    def next(self) -> int:
        self.value += 1
        atomic_write_text(self.path, f"{self.value}\n")
        return self.value


def _in_ray() -> bool:
    """Ray is never imported here for the first time: a run without it must not load it."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _put(bucket: WeightBucket) -> Any:
    return sys.modules["ray"].put(bucket) if _in_ray() else bucket


def _get(handle: Any) -> WeightBucket:
    return sys.modules["ray"].get(handle) if _in_ray() else handle
