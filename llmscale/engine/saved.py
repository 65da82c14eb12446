"""The weights in a checkpoint, read without an engine and, of the files, only what is wanted of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmscale.engine.accounting import parameter_buckets
from llmscale.engine.averaging import NAME as AVERAGE
from llmscale.engine.state import Part
from llmscale.errors import CheckpointError

Weights = Mapping[str, Callable[[], Tensor]]  # name -> reads it


def saved_buckets(directory: Path, model: nn.Module, bucket_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The fp32 weights that `snapshot` of any engine wrote, their average where one was kept, named as in `model`, in
    buckets of at most `bucket_bytes` (or one weight). Of `model` only names and shapes count: it may be on the meta
    device. Frozen weights are not in the files: they are those of `model`. The caller has verified the files.

    Raises: CheckpointError when they are of another model.
    """
    with ExitStack() as opened:
        weights = _open(directory, opened)
        for bucket in parameter_buckets(model, bucket_bytes):
            read = {
                name: _read(weights, name, parameter, directory) if parameter.requires_grad else parameter.detach()
                for name, parameter in bucket.items()
            }
            yield read
            del read  # before the next one is read


def _read(weights: Weights, name: str, parameter: nn.Parameter, directory: Path) -> Tensor:
    if name not in weights:
        raise _other_model(directory, f"{name} is not in this checkpoint")
    value = weights[name]()
    if value.shape != parameter.shape:
        there, here = list(value.shape), list(parameter.shape)
        raise _other_model(directory, f"{name} is {there} in this checkpoint and {here} in the model")
    return value


def _other_model(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(directory), fix="Is the config.yaml beside it that of the same run?")


def _open(directory: Path, opened: ExitStack) -> Weights:
    paths = sorted(directory.glob("state-*"))
    if not paths:
        fix = "One of an earlier version has to be exported by that version."
        raise CheckpointError("it holds no files state-*.safetensors", where=str(directory), fix=fix)
    if any(part.num_shards > 1 for path in paths if (part := Part.of_file(path))):
        what = "its ranks shared matrices (engine.tensor_parallel_size), and only their engine joins them"
        raise CheckpointError(what, where=str(directory), fix="Let the run end: it writes the model itself.")
    return _joined([opened.enter_context(_reader(path)) for path in paths])


def _reader(path: Path) -> Any:
    return safe_open(path, "pt", backend="pread")  # a mapped file would stay in memory as a whole


def _joined(files: list[Any]) -> Weights:
    """Each rank's file holds pieces of parameters; its metadata says which."""
    pieces: dict[str, list[tuple[int, Any, str]]] = {}  # weight -> first element, file, name in it
    shapes: dict[str, list[int]] = {}
    for file in files:
        held = set(file.keys())
        for name, piece in json.loads(file.metadata()["parameters"]).items():
            average = f"{name}|{AVERAGE}"
            pieces.setdefault(name, []).append((piece["start"], file, average if average in held else f"{name}|weight"))
            shapes[name] = piece["shape"]

    def read(name: str) -> Tensor:
        flat = [file.get_tensor(key) for _, file, key in sorted(pieces[name], key=lambda piece: piece[0])]
        return torch.cat(flat).view(shapes[name])

    return {name: partial(read, name) for name in pieces}
