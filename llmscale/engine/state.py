"""What an engine writes into a checkpoint, the same for every engine: each trained parameter's fp32 weight and optimizer
state by the parameter's name, in pieces as the ranks hold them. Who loads takes the ranges that it needs, whoever wrote
them: another number of ranks, another ZeRO stage and `single` read the same files without a conversion, and equals read
back every bit. Frozen parameters are those of the model that the engine was built with, and are not written.

    state-00000-of-00002.safetensors, one a rank (with tensor parallelism ...-tp0of2.safetensors)
        "model.norm.weight|exp_avg"   elements start, start + 1, ... of the flattened parameter
        metadata                      num_steps, and of each parameter {"shape", "start", "numbers": {"step": 8}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llmscale.checkpoint.tensors import save_tensors
from llmscale.errors import CheckpointError
from llmscale.protocols import Digests

WEIGHT = "weight"  # beside the optimizer's own names of what it keeps, such as exp_avg


@dataclass(frozen=True)
class Part:
    """Which of how many files a rank writes. Ranks that share matrices (tensor parallelism) hold other tensors under the
    same names: each shard has files of its own, and is read by that shard alone."""

    index: int = 0
    num_parts: int = 1
    shard: int = 0
    num_shards: int = 1

    @property
    def file_name(self) -> str:
        shard = f"-tp{self.shard}of{self.num_shards}" if self.num_shards > 1 else ""
        return f"state-{self.index:05d}-of-{self.num_parts:05d}{shard}.safetensors"

    @staticmethod
    def of_file(path: Path) -> Part | None:
        match = re.fullmatch(r"state-(\d+)-of-(\d+)(?:-tp(\d+)of(\d+))?\.safetensors", path.name)
        return Part(*(int(n or d) for n, d in zip(match.groups(), "0101", strict=True))) if match else None


@dataclass(frozen=True)
class Piece:
    """Elements `start`, `start` + 1, ... of one flattened parameter, as this rank holds them."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    weight: Tensor  # 1-D, in the fp32 of the optimizer
    state: dict[str, Any]  # the optimizer's of the tensor that `weight` lies in: that tensor may hold several pieces
    offset: int = 0  # of this piece within that tensor

    def tensors(self) -> dict[str, Tensor]:
        """1-D views of the live weight and state, all of one length."""
        states = {key: value.view(-1) for key, value in self.state.items() if _is_elementwise(value)}
        own = {key: value.narrow(0, self.offset, len(self.weight)) for key, value in states.items()}
        return {WEIGHT: self.weight} | own

    def numbers(self) -> dict[str, float]:
        """What the optimizer keeps once for the whole tensor: how many steps it has made."""
        return {key: float(value) for key, value in self.state.items() if not _is_elementwise(value)}


def trained_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of the whole parameters: ZeRO-3 leaves an empty tensor in the place of one that it has cut up."""
    return {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters() if p.requires_grad}


def _is_elementwise(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def snapshot(pieces: Sequence[Piece], num_steps: int, part: Part) -> Callable[[Path], Digests]:
    """Copy the pieces to the CPU; what is returned writes the copy into a directory, whenever."""
    copied = {
        f"{piece.name}|{key}": value.detach().to("cpu", copy=True)
        for piece in pieces
        for key, value in piece.tensors().items()
    }
    parameters = {p.name: {"shape": list(p.shape), "start": p.start, "numbers": p.numbers()} for p in pieces}
    metadata = {"num_steps": str(num_steps), "parameters": json.dumps(parameters)}
    return lambda directory: {part.file_name: save_tensors(directory / part.file_name, copied, metadata)}


@torch.no_grad()
def load(directory: Path, pieces: Sequence[Piece], model: nn.Module, part: Part) -> int:
    """Fill weights and optimizer state in place, one range at a time; returns the number of steps made until then.

    The optimizer must have made its state; what it holds does not matter.
    Raises: CheckpointError when the files are of another model, another optimizer or other shards of matrices.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in _files(directory, part)]
        saved = _Saved(directory, files)
        saved.check_shapes(trained_shapes(model))
        for piece in pieces:
            for key in piece.numbers():
                _set_number(piece.state, key, 0)
        for piece in pieces:
            saved.fill(piece)
    return saved.num_steps


def _files(directory: Path, own: Part) -> list[Path]:
    """All files of this shard, whatever number of ranks wrote them."""
    found = {path: part for path in sorted(directory.iterdir()) if (part := Part.of_file(path))}
    written = {part.num_shards for part in found.values()}
    if written and written != {own.num_shards}:
        raise CheckpointError(
            f"it was written with engine.tensor_parallel_size={max(written)}, the run has {own.num_shards}",
            where=str(directory),
            fix=f"Resume with engine.tensor_parallel_size={max(written)}, or start a new run from its export.",
        )
    files = [path for path, part in found.items() if part.shard == own.shard]
    if not files or len(files) != found[files[0]].num_parts:
        raise CheckpointError(
            f"{len(files)} files state-*.safetensors are not what one engine wrote",
            where=str(directory),
            fix="Resume from another checkpoint; one of an earlier version has to be resumed with that version.",
        )
    return files


class _Saved:
    """The open files of a checkpoint, and which of them holds which part of a parameter."""

    def __init__(self, directory: Path, files: Sequence[Any]):
        self.directory = directory
        self.num_steps = int(files[0].metadata()["num_steps"])
        self.parts: dict[str, list[tuple[Any, dict[str, Any]]]] = {}
        self.keys: dict[str, set[str]] = {}  # parameter -> what is there of it
        for file in files:
            for name, entry in json.loads(file.metadata()["parameters"]).items():
                self.parts.setdefault(name, []).append((file, entry))
            for tensor in file.offset_keys():
                name, _, key = tensor.rpartition("|")
                self.keys.setdefault(name, set()).add(key)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        saved = {name: tuple(parts[0][1]["shape"]) for name, parts in self.parts.items()}
        for name in saved | dict(shapes):
            there, here = (str(list(of[name])) if name in of else "missing" for of in (saved, shapes))
            if there != here:
                raise self._refused(
                    f"{name} is {there} in this checkpoint and {here} in the model",
                    "Resume with the model that it was written with: see model in the run's config.yaml.",
                )

    def fill(self, piece: Piece) -> None:
        views, saved = piece.tensors(), self.keys[piece.name]
        expected = set(views) - {WEIGHT}
        if expected and len(saved) > 1 and saved - {WEIGHT} != expected:
            kept, needed = (", ".join(sorted(keys)) for keys in (saved - {WEIGHT}, expected))
            raise self._refused(
                f"its optimizer kept {kept} of a weight, that of the run keeps {needed}",
                "Resume with the optimizer that it was written with: see optim in the run's config.yaml.",
            )
        missing = len(piece.weight)
        for file, entry in self.parts[piece.name]:
            missing -= self._copy(piece, views, file, entry)
        if missing:
            raise self._refused(f"{missing} elements of {piece.name} are in none of its files", "Resume from another.")

    def _copy(self, piece: Piece, views: Mapping[str, Tensor], file: Any, entry: Mapping[str, Any]) -> int:
        """Take what this file has of the piece; returns how many elements."""
        held = file.get_slice(f"{piece.name}|{WEIGHT}").get_shape()[0]
        first = max(piece.start, entry["start"])
        last = min(piece.start + len(piece.weight), entry["start"] + held)
        if first >= last:
            return 0
        for key, view in views.items():
            into = view[first - piece.start : last - piece.start]
            if key in self.keys[piece.name]:
                saved = file.get_slice(f"{piece.name}|{key}")
                into.copy_(saved[first - entry["start"] : last - entry["start"]])
            else:
                into.zero_()  # it had not been trained yet
        for key, number in entry["numbers"].items():
            if key in piece.state:
                _set_number(piece.state, key, max(number, float(piece.state[key])))
        return last - first

    def _refused(self, what: str, fix: str) -> CheckpointError:
        return CheckpointError(what, where=str(self.directory), fix=fix)


def _set_number(state: dict[str, Any], key: str, number: float) -> None:
    if isinstance(state[key], Tensor):
        state[key].fill_(number)
    else:
        state[key] = type(state[key])(number)
