"""Weights as raw arrays that travel between processes, with a fingerprint that both sides compute."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from llmscale.errors import WeightMismatchError
from llmscale.protocols import WeightBucket


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Digest of names, types and bytes, in order."""
    digest = xxhash.xxh3_128()  # against accidents and not against people: 17 times as fast as blake2b here
    for name, value in weights.items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bits(value.detach().cpu()).contiguous().numpy().data)
    return digest.hexdigest()


def pack(weights: Mapping[str, Tensor], dtype: torch.dtype) -> WeightBucket:
    """A snapshot in the precision in which it will be used. numpy has no bf16: those bits travel as uint16."""
    cast = {name: value.to("cpu", dtype, copy=True).contiguous() for name, value in weights.items()}
    arrays = {name: _bits(value).numpy() for name, value in cast.items()}
    return WeightBucket(
        arrays, {name: str(v.dtype).removeprefix("torch.") for name, v in cast.items()}, fingerprint(cast)
    )


def load_buckets(model: nn.Module, buckets: list[WeightBucket], source: str) -> None:
    """Copy published weights into `model`, then check that it holds exactly what was published: all of its own, or those of
    its adapter alone.

    Raises: WeightMismatchError naming `source` when a weight is missing or unknown, or its shape or bits differ.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sent = [name for bucket in buckets for name in bucket.arrays]
    if sorted(sent) != sorted(parameters):
        odd = sorted(set(sent) ^ set(parameters))
        raise WeightMismatchError(f"published and own weights differ by name: {', '.join(odd[:4])}", where=source)
    shapes = {name: array.shape for bucket in buckets for name, array in bucket.arrays.items()}
    for name, parameter in parameters.items():
        if shapes[name] != tuple(parameter.shape):
            what = f"published {name} is {shapes[name]}, own is {tuple(parameter.shape)}"
            raise WeightMismatchError(what, where=source)
    for bucket in buckets:
        with torch.no_grad():
            for name, array in bucket.arrays.items():
                # The store's arrays are read-only and torch wants to write: from_numpy of a view is only read here.
                parameters[name].copy_(_restore(array, bucket.dtypes[name]))
        held = fingerprint({name: parameters[name].detach() for name in bucket.arrays})
        if held != bucket.digest:
            raise WeightMismatchError(
                f"the weights held ({held}) are not those published ({bucket.digest})",
                where=source,
                fix="A bucket was damaged on its way. Nothing was sampled with it; the same command resumes.",
            )


def _restore(array: np.ndarray, dtype: str) -> Tensor:
    target = getattr(torch, dtype)
    array = array if array.flags.writeable else array.copy()
    return torch.from_numpy(array).view(target)


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.uint16) if value.dtype is torch.bfloat16 else value
