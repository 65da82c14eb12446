"""The commit protocol: how a directory that several ranks fill becomes one checkpoint, completely or not at all.

    rank 0 makes .tmp-step-000100 | every rank writes its files into a part of its own, digests them, brings them to
    disk and leaves a mark | rank 0 sees every mark, moves the parts together, writes manifest.json, renames to
    step-000100, moves `latest`, prunes

A bar is a barrier. A checkpoint exists when its rename has happened; before that the one before it is untouched. What
loading may use is decided by the manifest alone: `latest` is for people. Digests are checked before anything is
unpickled. Ranks on several hosts need a file system that they share.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from llmscale.checkpoint.durable import atomic_write_text, discard, fsync, fsync_tree, remove, replace_directory
from llmscale.checkpoint.manifest import (
    ALGORITHM,
    MANIFEST,
    Checkpoint,
    File,
    Manifest,
    digest,
    file_names,
    files_from_json,
    files_to_json,
    read_manifest,
    verify,
)
from llmscale.checkpoint.task import Task
from llmscale.disk import is_full
from llmscale.errors import CheckpointError, DiskFullError, LlmscaleError

LATEST = "latest"
PINNED = ".pinned"  # a file in the checkpoint: it is never removed
_NAME = re.compile(r"(?:\.replaced-)?step-(\d+)(?:\.\d+)?")  # a replaced one is complete: see durable.replace_directory


class CheckpointStore:
    """The checkpoints of one run. One process group writes at a time (the lock of the run directory sees to that).

    Kept are the `keep` newest, with `keep_best` that of the lowest score too, and every one that is pinned.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_best: bool = False):
        if keep < 1:
            raise CheckpointError(f"keep must be at least 1, is {keep}", where=str(directory))
        self.directory = directory
        self.keep, self.keep_best = keep, keep_best
        self._broken: set[Path] = set()  # passed over by newest_valid: they do not count among those to keep

    def save(
        self,
        step: int,
        write: Callable[[Path], Mapping[str, str] | None],
        *,
        rank: int = 0,
        world_size: int = 1,
        barrier: Callable[[], None] = lambda: None,
        expected_bytes: int | None = None,
        score: float | None = None,
    ) -> Path:
        """Collective: every rank calls this, and its `write` puts its own files into the directory that it is given. It may
        return digests of some of them, which are then not read again.

        `expected_bytes` is the size of the whole checkpoint, to refuse early when the disk has less; by default that
        of the checkpoint before. `score` (lower is better; one that is not finite counts as none) goes into the
        manifest. Checkpoints of later steps belong to a past that was rolled back: they are removed.

        When any rank fails, all of them still pass the same barriers, nothing is committed and every rank raises: the
        failing one its own error, the others one that names it. A rank that dies, or fails inside a collective that
        its `write` calls, leaves the others to the time limit of their process group; nothing is committed then either.

        Raises: CheckpointError when the disk or another rank failed; whatever else `write` raised, as it is.
        """
        target = self._target(step)
        partial = self.directory / f".tmp-step-{step:06d}"

        def prepare() -> None:
            if rank == 0:
                self._prepare(partial, expected_bytes)

        def write_part() -> None:
            _require(partial)
            part = _part(partial, rank)
            part.mkdir()
            files = _on_disk(part, write(part) or {})
            atomic_write_text(_mark(partial, rank), json.dumps(files_to_json(files)))

        def commit() -> None:
            nonlocal target
            if rank == 0:
                target = self._target(step)  # again: it may have been pinned meanwhile
                files = _assemble(step, partial, world_size)
                self._commit(step, score, files, partial, target)

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
        kind = DiskFullError if is_full(error) else CheckpointError
        raise kind(
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
        """What is there, the last one that was committed first, not verified. After a rollback that is not the highest
        step, when a later one is pinned."""
        if not self.directory.is_dir():
            return []
        named = [(_NAME.fullmatch(path.name), path) for path in self.directory.iterdir()]
        found = [Checkpoint(int(match[1]), path) for match, path in named if match]
        return sorted(found, key=_order, reverse=True)

    def _prepare(self, partial: Path, expected_bytes: int | None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        fsync(self.directory.parent)
        for leftover in self.directory.glob(".tmp-*"):
            remove(leftover)
        before = next((manifest.num_bytes for manifest in self._manifests()), 0)
        needed = before if expected_bytes is None else expected_bytes
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise DiskFullError(
                f"a checkpoint needs about {needed} bytes and {free} bytes are free",
                where=str(self.directory),
                fix="Free some space; the checkpoints that are there are untouched.",
            )
        partial.mkdir()

    def _manifests(self) -> list[Manifest]:
        """Those that can be read, newest first; loading reports the others."""
        return [manifest for checkpoint in self.checkpoints() if (manifest := _manifest_or_none(checkpoint))]

    def _target(self, step: int) -> Path:
        """Where a checkpoint of this step goes: in the place of an earlier one, unless that is pinned."""
        names = chain([f"step-{step:06d}"], (f"step-{step:06d}.{n}" for n in count(2)))
        return next(path for name in names if not is_pinned(path := self.directory / name))

    def _commit(self, step: int, score: float | None, files: dict[str, File], partial: Path, target: Path) -> None:
        number = 1 + max((manifest.number for manifest in self._manifests()), default=0)
        score = score if score is not None and math.isfinite(score) else None
        Manifest(step, files, number, score).write(partial)
        replace_directory(partial, target)
        self._broken.discard(target)
        self._point_latest(target)
        self._prune()

    def _point_latest(self, target: Path) -> None:
        latest, fresh = self.directory / LATEST, self.directory / f".tmp-{LATEST}"
        if latest.is_dir() and not latest.is_symlink():
            remove(latest)  # a copied run may have a directory in place of the link
        fresh.symlink_to(target.name)
        fresh.replace(latest)
        fsync(self.directory)

    def _prune(self) -> None:
        stored = self.checkpoints()
        manifests = {c: m for c in stored if c.path not in self._broken and (m := _manifest_or_none(c))}
        past: list[Checkpoint] = []  # back from the newest; what does not lie before it was rolled back
        for checkpoint in manifests:
            if not past or checkpoint.step < past[-1].step:
                past.append(checkpoint)
        kept = past[: self.keep]
        scores = {c: score for c in past if (score := manifests[c].score) is not None}
        if self.keep_best and scores:
            kept.append(min(scores, key=scores.__getitem__))  # of equal ones the newest
        for checkpoint in stored:
            if checkpoint not in kept and not is_pinned(checkpoint.path):
                discard(checkpoint.path)


def is_pinned(checkpoint: Path) -> bool:
    return os.path.exists(checkpoint / PINNED)


def pin(checkpoint: Path) -> None:
    """Keep a checkpoint whatever comes, a rollback and another one of the same step included."""
    (checkpoint / PINNED).touch()
    fsync(checkpoint)


def unpin(checkpoint: Path) -> None:
    (checkpoint / PINNED).unlink(missing_ok=True)
    fsync(checkpoint)


def _order(checkpoint: Checkpoint) -> tuple[float, int, str]:
    """One without a manifest that can be read comes first: it is passed over, and somebody should hear of it. A replaced
    one stands behind the one that replaced it."""
    manifest = _manifest_or_none(checkpoint)
    return manifest.number if manifest else math.inf, checkpoint.step, checkpoint.path.name


def _manifest_or_none(checkpoint: Checkpoint) -> Manifest | None:
    try:
        return read_manifest(checkpoint)
    except CheckpointError:
        return None


def _on_disk(part: Path, digests: Mapping[str, str]) -> dict[str, File]:
    """Bring a rank's files to disk and digest meanwhile those that were not as they were written."""
    synced = Task(lambda: fsync_tree(part))
    try:
        sizes = {name: (part / name).stat().st_size for name in file_names(part)}
        return {name: File(n, ALGORITHM, digests.get(name) or digest(part / name)) for name, n in sizes.items()}
    finally:
        synced.result()


def _assemble(step: int, partial: Path, world_size: int) -> dict[str, File]:
    """Move the parts of all ranks together; returns every file of them."""
    marks = [_mark(partial, rank) for rank in range(world_size)]
    present = set(os.listdir(partial))  # a listing: network file systems may remember that a name was not there
    silent = [str(rank) for rank, mark in enumerate(marks) if mark.name not in present]
    if silent:
        raise CheckpointError(
            f"step {step} is not saved: its part was not written by rank {', '.join(silent)}",
            where=str(partial),
            fix="The log of that rank says why; earlier checkpoints are untouched.",
        )
    files: dict[str, File] = {}
    for rank, mark in enumerate(marks):
        part = _part(partial, rank)
        for name, file in files_from_json(json.loads(mark.read_text(encoding="utf-8"))).items():
            if name in files or name == MANIFEST:
                what = "two ranks wrote" if name in files else "a checkpoint cannot hold"
                raise CheckpointError(f"{what} a file {name}", where=str(partial))
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).rename(partial / name)
            files[name] = file
        remove(part)
        mark.unlink()
    for directory in filter(Path.is_dir, partial.rglob("*")):
        fsync(directory)
    return files


def _free_bytes(directory: Path) -> int:
    there = next(path for path in (directory, *directory.parents) if os.path.exists(path))
    return shutil.disk_usage(there).free


def _part(partial: Path, rank: int) -> Path:
    """Where a rank writes. What lies there is its own, so that each host digests what it has in memory."""
    return partial / f".part-{rank:05d}"


def _mark(partial: Path, rank: int) -> Path:
    """Lists the files of this rank's part. That it exists says that they are complete and on disk."""
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
