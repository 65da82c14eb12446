"""The commit protocol: how a directory that several ranks fill becomes one checkpoint, completely or not at all.

    rank 0 makes .tmp-step-000100 | every rank writes its files into it, brings them to disk and leaves a mark |
    rank 0 sees every mark, digests every file, writes manifest.json, renames to step-000100, moves `latest`, prunes

A bar is a barrier. A checkpoint exists when its rename has happened; before that the one before it is untouched. What
loading may use is decided by the manifest alone: `latest` is for people. Digests are checked before anything is
unpickled. Ranks on several hosts need a file system that they share.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmscale.checkpoint.durable import atomic_write_text, discard, fsync, fsync_tree, remove, replace_directory
from llmscale.errors import CheckpointError, LlmscaleError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"(?:\.replaced-)?step-(\d+)")  # a replaced one is complete: see durable.replace_directory


@dataclass(frozen=True)
class Checkpoint:
    step: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run. One process group writes at a time (the lock of the run directory sees to that)."""

    def __init__(self, directory: Path, keep: int = 2):
        if keep < 1:
            raise CheckpointError(f"keep must be at least 1, is {keep}", where=str(directory))
        self.directory = directory
        self.keep = keep
        self._broken: set[Path] = set()  # passed over by newest_valid: they do not count among those to keep

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        expected_bytes: int | None = None,
    ) -> Path:
        """Collective: every rank calls this, and its `write` puts its own files into the directory that it is given.

        `expected_bytes` is the size of the whole checkpoint, to refuse early when the disk has less; by default that
        of the checkpoint before. Checkpoints of later steps belong to a past that was rolled back: they are removed.

        When any rank fails, all of them still pass the same barriers, nothing is committed and every rank raises: the
        failing one its own error, the others one that names it. A rank that dies, or fails inside a collective that
        its `write` calls, leaves the others to the time limit of their process group; nothing is committed then either.

        Raises: CheckpointError when the disk or another rank failed; whatever else `write` raised, as it is.
        """
        target = self.directory / f"step-{step:06d}"
        partial = self.directory / f".tmp-{target.name}"

        def prepare() -> None:
            if rank == 0:
                self._prepare(partial, expected_bytes)

        def write_part() -> None:
            _require(partial)
            write(partial)
            fsync_tree(partial)  # every host its own dirty pages; a file that another rank has synced costs nothing
            _mark(partial, rank).touch()

        def commit() -> None:
            if rank == 0:
                self._commit(step, partial, target, world_size)

        def confirm() -> None:
            if rank != 0 and partial.name in os.listdir(self.directory):
                raise CheckpointError(
                    f"rank 0 did not commit step {step}", where=str(partial), fix="The log of rank 0 says why."
                )

        error = _in_lockstep((prepare, write_part, commit, confirm), barrier)
        if error is None:
            return target
        free = _free_bytes(self.directory)
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # give a full disk its space back
        if isinstance(error, LlmscaleError) or not isinstance(error, OSError | RuntimeError):
            raise error  # anything else than a failed write is a fault of ours and stays as it is
        # torch.save reports a full disk as a RuntimeError, so the free space has to tell.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot write the checkpoint of step {step}: {reason} ({free} bytes were free)",
            where=str(self.directory),
            fix="Make the directory writable or free some space; earlier checkpoints are untouched.",
        ) from error

    def newest_valid(self, on_skip: Callable[[Path, str], None] = lambda path, why: None) -> Checkpoint | None:
        """The newest checkpoint whose files are those of its manifest; None when the run has no checkpoint at all.

        It reads every byte: let one rank call it and tell the others the step. `on_skip` hears of each broken one.

        Raises: CheckpointError when there are checkpoints and all are broken, for to start again from the beginning
        is the user's decision.
        """
        reasons: list[str] = []
        for checkpoint in self.checkpoints():
            try:
                verify(checkpoint)
            except CheckpointError as error:
                reasons.append(error.what)
                self._broken.add(checkpoint.path)
                on_skip(checkpoint.path, error.what)
            else:
                return checkpoint
        if reasons:
            raise CheckpointError(
                f"every checkpoint of this run is broken; the newest: {reasons[0]}",
                where=str(self.directory),
                fix="Restore one from a backup, or remove this directory to train from the beginning.",
            )
        return None

    def checkpoints(self) -> list[Checkpoint]:
        """What is there, newest first, not verified."""
        if not self.directory.is_dir():
            return []
        named = [(_NAME.fullmatch(path.name), path) for path in self.directory.iterdir()]
        found = [Checkpoint(int(match[1]), path) for match, path in named if match]
        return sorted(found, key=lambda c: (c.step, c.path.name), reverse=True)  # "." sorts a replaced one behind

    def _prepare(self, partial: Path, expected_bytes: int | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        fsync(self.directory.parent)
        for leftover in self.directory.glob(".tmp-*"):
            remove(leftover)
        needed = self._last_bytes() if expected_bytes is None else expected_bytes
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise CheckpointError(
                f"a checkpoint needs about {needed} bytes and {free} bytes are free",
                where=str(self.directory),
                fix="Free some space; the checkpoints that are there are untouched.",
            )
        partial.mkdir()

    def _last_bytes(self) -> int:
        for checkpoint in self.checkpoints():
            try:
                return sum(size for size, _ in _read_manifest(checkpoint).values())
            except CheckpointError:
                continue  # only an estimate is wanted here; loading reports what is broken
        return 0

    def _commit(self, step: int, partial: Path, target: Path, world_size: int) -> None:
        marks = [_mark(partial, rank) for rank in range(world_size)]
        present = set(os.listdir(partial))  # a listing: network file systems may remember that a name was not there
        silent = [str(rank) for rank, mark in enumerate(marks) if mark.name not in present]
        if silent:
            raise CheckpointError(
                f"step {step} is not saved: its part was not written by rank {', '.join(silent)}",
                where=str(partial),
                fix="The log of that rank says why; earlier checkpoints are untouched.",
            )
        for mark in marks:
            mark.unlink()
        digests = _digests(partial, _files(partial))
        files = {name: {"bytes": (partial / name).stat().st_size, "blake2b": d} for name, d in digests.items()}
        if MANIFEST in files:
            raise CheckpointError(f"a checkpoint cannot hold a file {MANIFEST} of its own", where=str(partial))
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, "files": files}
        atomic_write_text(partial / MANIFEST, json.dumps(manifest, indent=1) + "\n")
        replace_directory(partial, target)
        self._broken.discard(target)
        self._point_latest(target)
        self._prune(step)

    def _point_latest(self, target: Path) -> None:
        latest, fresh = self.directory / LATEST, self.directory / f".tmp-{LATEST}"
        if latest.is_dir() and not latest.is_symlink():
            remove(latest)  # a copied run may have a directory in place of the link
        fresh.symlink_to(target.name)
        fresh.replace(latest)
        fsync(self.directory)

    def _prune(self, step: int) -> None:
        stored = self.checkpoints()
        kept = [c for c in stored if c.step <= step and c.path not in self._broken][: self.keep]
        for checkpoint in stored:
            if checkpoint not in kept:
                discard(checkpoint.path)


def verify(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError with the reason when the files of a checkpoint are not those of its manifest."""
    listed = _read_manifest(checkpoint)
    try:
        present = {name: (checkpoint.path / name).stat().st_size for name in _files(checkpoint.path)}
        # A loader may take whatever matches its pattern, so nothing may lie there that no digest covers.
        foreign = [n for n in present if n not in listed and n != MANIFEST and not Path(n).name.startswith(".")]
        if foreign:
            raise _broken(checkpoint, f"{foreign[0]} is not in the manifest")
        for name, (size, _) in listed.items():
            if name not in present:
                raise _broken(checkpoint, f"{name} is missing")
            if present[name] != size:
                raise _broken(checkpoint, f"{name} has {present[name]} bytes instead of {size}")
        for name, digest in _digests(checkpoint.path, list(listed)).items():
            if digest != listed[name][1]:
                raise _broken(checkpoint, f"the content of {name} is not what was written")
    except OSError as error:
        raise _broken(checkpoint, f"it cannot be read: {error}") from error


def _read_manifest(checkpoint: Checkpoint) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, digest)."""
    try:
        manifest = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))
        schema, step = manifest["schema_version"], manifest["step"]
        files = {name: (int(entry["bytes"]), str(entry["blake2b"])) for name, entry in manifest["files"].items()}
    except OSError as error:
        raise _broken(checkpoint, f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(checkpoint, f"{MANIFEST} is damaged") from error
    if schema != SCHEMA_VERSION:
        raise _broken(checkpoint, f"its schema version is {schema}, this program reads {SCHEMA_VERSION}")
    if step != checkpoint.step:
        raise _broken(checkpoint, f"its manifest is of step {step}")
    return files


def _broken(checkpoint: Checkpoint, why: str) -> CheckpointError:
    return CheckpointError(why, where=str(checkpoint.path))


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def _digests(directory: Path, names: Sequence[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing releases the interpreter lock
        return dict(zip(names, pool.map(digest, names), strict=True))


def _free_bytes(directory: Path) -> int:
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return shutil.disk_usage(there).free


def _mark(partial: Path, rank: int) -> Path:
    """That it exists says that this rank's part is complete and on disk; a full disk cannot fake it."""
    return partial / f".written-{rank:05d}"


def _require(partial: Path) -> None:
    if not partial.is_dir():
        raise CheckpointError(
            "rank 0 made no directory for this checkpoint",
            where=str(partial),
            fix="The log of rank 0 says why. On several hosts the run directory must be on a shared file system.",
        )


def _in_lockstep(phases: Sequence[Callable[[], None]], barrier: Callable[[], None]) -> Exception | None:
    """Run the phases with a barrier after each. A rank that failed skips the rest but never a barrier, so that no
    other rank waits for it. Returns the first error."""
    first: Exception | None = None
    for phase in phases:
        try:
            if first is None:
                phase()
        except Exception as error:
            first = error
        try:
            barrier()
        except Exception as error:
            raise (first or error) from error  # a broken barrier often only follows from what failed here
    return first
