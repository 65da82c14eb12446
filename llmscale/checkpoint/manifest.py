"""The manifest of a checkpoint: its files with their sizes and digests, and what retention remembers over restarts.

Digests find what was truncated, flipped or only half copied. They do not stop somebody who changes files on purpose: he
could change the manifest too. So speed decides: XXH3 (128 bits) is as fast as memory, where a cryptographic digest takes
longer than the disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from llmscale.checkpoint.durable import atomic_write_text
from llmscale.errors import CheckpointError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)  # 1: digests are BLAKE2b, and there is neither number nor score
ALGORITHM = "xxh3_128"
_DIGESTS: dict[str, Callable[[], Any]] = {ALGORITHM: xxhash.xxh3_128, "blake2b": hashlib.blake2b}


@dataclass(frozen=True)
class Checkpoint:
    """A directory that has the name of a checkpoint; `verify` says whether it is one."""

    step: int
    path: Path


@dataclass(frozen=True)
class File:
    num_bytes: int
    algorithm: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    step: int
    files: dict[str, File]  # by path relative to the checkpoint
    number: int = 0  # counts the commits of a run: after a rollback steps come again, numbers do not
    score: float | None = None  # what the best checkpoint has the lowest of

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())

    def write(self, directory: Path) -> None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "number": self.number,
            "score": self.score,
            "files": files_to_json(self.files),
        }
        atomic_write_text(directory / MANIFEST, json.dumps(content, indent=1) + "\n")


def read_manifest(checkpoint: Checkpoint) -> Manifest:
    """Raises: CheckpointError when there is none, or none of this step that this program can read."""
    try:
        content = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
        schema, score = content["schema_version"], content.get("score")
        if schema not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise broken(checkpoint, f"its schema version is {schema}, this program reads {known}")
        manifest = Manifest(
            step=int(content["step"]),
            files=files_from_json(content["files"]),
            number=int(content.get("number", 0)),
            score=None if score is None else float(score),
        )
    except OSError as error:
        raise broken(checkpoint, f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(checkpoint, f"{MANIFEST} is damaged") from error
    if manifest.step != checkpoint.step:
        raise broken(checkpoint, f"its manifest is of step {manifest.step}")
    return manifest


def files_to_json(files: Mapping[str, File]) -> dict[str, Any]:
    return {name: {"bytes": f.num_bytes, f.algorithm: f.digest} for name, f in files.items()}


def files_from_json(content: Mapping[str, Any]) -> dict[str, File]:
    """Raises: ValueError, KeyError, TypeError or AttributeError when it is not what `files_to_json` made."""
    files = {}
    for name, entry in content.items():
        algorithm = next((a for a in _DIGESTS if a in entry), ALGORITHM)
        files[name] = File(int(entry["bytes"]), algorithm, str(entry[algorithm]))
    return files


def broken(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(why, where=str(checkpoint.path))


def verify(checkpoint: Checkpoint) -> Manifest:
    """Read every byte of a checkpoint.

    Raises: CheckpointError with the reason when its files are not those of its manifest.
    """
    manifest = verify_names(checkpoint)

    def agrees(name: str) -> bool:
        return digest(checkpoint.path / name, manifest.files[name].algorithm) == manifest.files[name].digest

    try:
        with ThreadPoolExecutor(max_workers=8) as pool:  # reading and hashing release the interpreter lock
            for name, good in zip(manifest.files, pool.map(agrees, manifest.files), strict=True):
                if not good:
                    raise broken(checkpoint, f"the content of {name} is not what was written")
    except OSError as error:
        raise broken(checkpoint, f"it cannot be read: {error}") from error
    return manifest


def verify_names(checkpoint: Checkpoint) -> Manifest:
    """The cheap part of `verify`: that the files are there, with their sizes, and no others."""
    manifest = read_manifest(checkpoint)
    try:
        present = {name: (checkpoint.path / name).stat().st_size for name in file_names(checkpoint.path)}
    except OSError as error:
        raise broken(checkpoint, f"it cannot be read: {error}") from error
    # A loader may take whatever matches its pattern, so nothing may lie there that no digest covers.
    foreign = [n for n in present if n not in manifest.files and n != MANIFEST and not Path(n).name.startswith(".")]
    if foreign:
        raise broken(checkpoint, f"{foreign[0]} is not in the manifest")
    for name, file in manifest.files.items():
        if name not in present:
            raise broken(checkpoint, f"{name} is missing")
        if present[name] != file.num_bytes:
            raise broken(checkpoint, f"{name} has {present[name]} bytes instead of {file.num_bytes}")
    return manifest


def file_names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def new_digest() -> Any:
    """One that is fed a part of a file at a time, and agrees with `digest` of the whole."""
    return _DIGESTS[ALGORITHM]()


def digest(path: Path, algorithm: str = ALGORITHM) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _DIGESTS[algorithm]).hexdigest()
