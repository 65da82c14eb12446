"""Weights as raw arrays that travel between processes, with a fingerprint that both sides compute."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from llmscale.errors import DamagedWeightsError, WeightMismatchError
from llmscale.protocols import WeightBucket


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Digest of names, types and bytes, in order."""
    digest = xxhash.xxh3_128()  # against accidents and not against people: 17 times as fast as blake2b here
    for name, value in weights.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bits(value.detach().cpu()).contiguous().numpy().data)
    return digest.hexdigest()


def pack(weights: Mapping[str, Tensor], dtype: torch.dtype, copy: bool = True) -> WeightBucket:
    """The weights in the precision in which they will be used, on the CPU, a snapshot unless `copy` is False."""
    return bucket_of({n: v.detach().to("cpu", dtype, copy=copy).contiguous() for n, v in weights.items()})


def bucket_of(weights: Mapping[str, Tensor], digest: str | None = None) -> WeightBucket:
    """Tensors on the CPU as what travels, where they lie; `digest` is what their sender found. numpy has no bf16: those bits
    travel as uint16."""
    arrays = {name: _bits(value).numpy() for name, value in weights.items()}
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in weights.items()}
    return WeightBucket(arrays, dtypes, fingerprint(weights) if digest is None else digest)


def load_buckets(model: nn.Module, buckets: Sequence[WeightBucket], source: str) -> None:
    """Copy published weights into `model`, all of its own or those of its adapter alone, and check that what arrived and what
    it then holds is exactly what was published.

    Raises: WeightMismatchError naming `source` when a weight is missing or unknown, or its shape or bits differ.
    """
    parameters = published_parameters(model)
    check_names(parameters, buckets, source)
    arrived = [unpack(bucket, source) for bucket in buckets]  # all are checked before any is used
    for bucket, weights in zip(buckets, arrived, strict=True):
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        _check_bits({name: parameters[name].detach() for name in bucket.arrays}, bucket, source)


def published_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def check_names(parameters: Mapping[str, Tensor], buckets: Sequence[WeightBucket], source: str) -> None:
    """Raises: WeightMismatchError when the buckets hold other weights than these, or weights of other shapes."""
    shapes = {name: array.shape for bucket in buckets for name, array in bucket.arrays.items()}
    sent = [name for bucket in buckets for name in bucket.arrays]
    if sorted(sent) != sorted(parameters):
        odd = sorted(set(sent) ^ set(parameters))
        raise WeightMismatchError(f"published and own weights differ by name: {', '.join(odd[:4])}", where=source)
    for name, parameter in parameters.items():
        if shapes[name] != tuple(parameter.shape):
            what = f"published {name} is {shapes[name]}, own is {tuple(parameter.shape)}"
            raise WeightMismatchError(what, where=source)


def unpack(bucket: WeightBucket, source: str) -> dict[str, Tensor]:
    """The weights of a bucket, where they lie. Raises: DamagedWeightsError when they are not those that were published."""
    weights = {name: _restore(array, bucket.dtypes[name]) for name, array in bucket.arrays.items()}
    _check_bits(weights, bucket, source)
    return weights


def _check_bits(held: Mapping[str, Tensor], bucket: WeightBucket, source: str) -> None:
    found = fingerprint(held)
    if found != bucket.digest:
        raise DamagedWeightsError(
            f"the weights held ({found}) are not those published ({bucket.digest})",
            where=source,
            fix="A bucket was damaged on its way. Nothing was sampled with it; the same command resumes.",
        )


def _restore(array: np.ndarray, dtype: str) -> Tensor:
    """The same memory as a tensor. That of Ray's object store is read-only, and is only read here."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return torch.from_numpy(array).view(getattr(torch, dtype))


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.uint16) if value.dtype is torch.bfloat16 else value
