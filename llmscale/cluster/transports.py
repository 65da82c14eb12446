"""Ways for weights from the policy's first rank to every rollout worker, bucket by bucket. What they deliver is not trusted:
the engine that takes it computes every digest again before it uses any weight (`llmscale.models.weights.unpack`).

Memory, M being the size of the weights that are published and a bucket at most BUCKET_BYTES. Nothing may be used before all of
it is there and verified, so that all of it has to lie somewhere besides the weights in use:

| | sender | until all workers hold it |
|---|---|---|
| direct | one bucket | M, in the process |
| object store | one bucket | M of shared memory on each host |
| file | one bucket | M on disk; as much of it in the page cache of a host as there is room |
| broadcast | one bucket | M of host memory in each worker, and on GPUs a bucket of the device's |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmscale import distributed
from llmscale.checkpoint.durable import commit_directory, remove
from llmscale.cluster.config import ClusterConfig, Transport
from llmscale.errors import DamagedWeightsError
from llmscale.models.weights import bucket_of, fingerprint, pack
from llmscale.protocols import WeightBucket

Buckets = Iterable[Mapping[str, Tensor]]  # gathered; empty ones on ranks that receive nothing


class Carrier(Protocol):
    """Both ends of a way; each worker has one of its own, and so has the driver, to clear up."""

    keeps: bool  # what was sent, so that it can be received again

    def send(self, version: int, buckets: Buckets, dtype: torch.dtype, meeting: Any = None) -> Any:
        """On every rank of the policy. `meeting` is where receivers are met, where both ends have to be at work at the same
        time; else the first rank returns what they need to find the weights afterwards."""
        ...

    def receive(self, version: int, parcel: Any) -> list[WeightBucket]:
        """`parcel` is what the sender returned, or the meeting."""
        ...

    def clear(self, version: int) -> None:
        """Every receiver holds this version, or a newer one. It stays, for those that take the place of one of them."""
        ...


class Direct:
    """From hand to hand, in one process."""

    keeps = True

    def send(self, version: int, buckets: Buckets, dtype: torch.dtype, meeting: None = None) -> list[WeightBucket]:
        return list(map(partial(pack, dtype=dtype), filter(None, buckets)))  # map keeps no bucket for longer

    def receive(self, version: int, parcel: list[WeightBucket]) -> list[WeightBucket]:
        return parcel

    def clear(self, version: int) -> None: ...


class ObjectStore:
    """Ray's: numpy arrays there are shared memory, read without a copy by every worker of a host."""

    keeps = True

    def send(self, version: int, buckets: Buckets, dtype: torch.dtype, meeting: None = None) -> list[Any]:
        import ray

        # The store makes the copy, and map keeps no bucket for longer.
        return list(map(lambda bucket: ray.put(pack(bucket, dtype, copy=False)), filter(None, buckets)))

    def receive(self, version: int, parcel: list[Any]) -> list[WeightBucket]:
        import ray

        return ray.get(parcel)

    def clear(self, version: int) -> None: ...


class Files:
    """Safetensors files, one a bucket, in a folder that every host sees; receivers map them into memory."""

    keeps = True

    def __init__(self, folder: Path):
        self.folder = folder

    def send(self, version: int, buckets: Buckets, dtype: torch.dtype, meeting: None = None) -> list[str]:
        if distributed.rank() != 0:
            return []
        paths: list[Path] = []
        commit_directory(self._of(version), partial(self._write, buckets, dtype, paths))
        return [str(self._of(version) / path.name) for path in paths]

    def receive(self, version: int, parcel: list[str]) -> list[WeightBucket]:
        return [self._read(path, f"weights {version}") for path in parcel]

    def clear(self, version: int) -> None:
        if not self.folder.exists():
            return
        versions = sorted(self.folder.iterdir())
        older = [path for path in versions if path.name < self._of(version).name]
        for path in older if len(older) < len(versions) else [self.folder]:
            remove(path)

    def _of(self, version: int) -> Path:
        return self.folder / f"version-{version:06d}"

    def _write(self, buckets: Buckets, dtype: torch.dtype, paths: list[Path], directory: Path) -> None:
        for bucket in buckets:
            weights = {n: v.detach().to("cpu", dtype).contiguous() for n, v in bucket.items()}
            paths.append(directory / f"bucket-{len(paths):04d}.safetensors")
            # The format sorts by name, and a digest is of the weights in their order.
            told = {"digest": fingerprint(weights), "names": json.dumps(list(weights))}
            save_file(weights, paths[-1], metadata=told)
            del bucket, weights  # else they would still be there while the next one is gathered

    def _read(self, path: str, source: str) -> WeightBucket:
        """Raises: DamagedWeightsError where the file is gone, cut off, or not what was written."""
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata()
                weights = {name: file.get_tensor(name) for name in json.loads(told["names"])}
                return bucket_of(weights, told["digest"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            what = f"{path} cannot be read as it was written: {error}"
            fix = "Nothing was sampled with it; the same command resumes."
            raise DamagedWeightsError(what, where=source, fix=fix) from error


def new_carrier(cluster: ClusterConfig, run_dir: Path) -> Carrier:
    """One end of the way that the config means."""
    chosen = cluster.carried_by
    if chosen is Transport.broadcast:
        from llmscale.cluster.broadcast import Broadcast

        return Broadcast(cluster)
    if chosen is Transport.file:
        return Files(run_dir.resolve() / "weights")
    return ObjectStore() if chosen is Transport.object_store else Direct()
