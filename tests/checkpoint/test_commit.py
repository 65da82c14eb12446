"""The commit protocol: save, load, retention, every kind of damage, several ranks, a full disk."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llmscale.checkpoint.background import AsyncSaver
from llmscale.checkpoint.commit import CheckpointStore, pin, unpin
from llmscale.checkpoint.manifest import MANIFEST, Checkpoint
from llmscale.errors import CheckpointError, NumericsError


def content(step: int) -> bytes:
    return bytes((step * 7 + i) % 256 for i in range(1000))


def writer(step: int) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "engine").mkdir(exist_ok=True)
        (directory / "engine" / "weights.bin").write_bytes(content(step))
        (directory / "state.json").write_text(json.dumps({"step": step}))

    return write


def file_writer(name: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).write_text("x")

    return write


def saved(directory: Path, *steps: int, keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(directory, keep=keep)
    for step in steps:
        store.save(step, writer(step))
    return store


def loaded(directory: Path) -> tuple[int | None, dict[str, str]]:
    """The step that a fresh process would load, and why others were passed over."""
    skipped: dict[str, str] = {}
    found = CheckpointStore(directory).newest_valid(lambda path, why: skipped.update({path.name: why}))
    if found is not None:
        assert (found.path / "engine" / "weights.bin").read_bytes() == content(found.step)
    return (found.step if found else None), skipped


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


# ---------------------------------------------------------------- save, load, retention


def test_a_run_without_checkpoints_has_none(checkpoints: Path):
    assert loaded(checkpoints) == (None, {})


def test_saves_load_and_prunes_beyond_keep(checkpoints: Path):
    store = saved(checkpoints, 50, 100, 1_000_000)
    assert store.save(1_000_001, writer(1_000_001)) == checkpoints / "step-1000001"
    assert names(checkpoints) == {"step-1000000", "step-1000001", "latest"}
    assert os.readlink(checkpoints / "latest") == "step-1000001"
    assert loaded(checkpoints) == (1_000_001, {})


def test_the_manifest_lists_every_file_with_its_size(checkpoints: Path):
    saved(checkpoints, 100)
    manifest = json.loads((checkpoints / "step-000100" / MANIFEST).read_text())
    assert (manifest["schema_version"], manifest["step"], manifest["number"]) == (2, 100, 1)
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        "engine/weights.bin": 1000,
        "state.json": len('{"step": 100}'),
    }


def test_the_same_step_can_be_saved_again(checkpoints: Path):
    store = saved(checkpoints, 50, 100)
    store.save(100, file_writer("other"))
    assert names(checkpoints / "step-000100") == {"other", MANIFEST}
    assert names(checkpoints) == {"step-000050", "step-000100", "latest"}


def test_a_replaced_checkpoint_still_loads_when_the_crash_came_between_the_renames(checkpoints: Path):
    saved(checkpoints, 100)
    (checkpoints / "step-000100").rename(checkpoints / ".replaced-step-000100")
    assert loaded(checkpoints) == (100, {})


def test_saving_after_a_rollback_removes_the_steps_beyond_it(checkpoints: Path):
    saved(checkpoints, 100, 150)
    saved(checkpoints, 120)
    assert names(checkpoints) == {"step-000100", "step-000120", "latest"}
    assert loaded(checkpoints) == (120, {})


def test_a_broken_checkpoint_takes_no_place_among_the_kept(checkpoints: Path):
    store = saved(checkpoints, 100, 150)
    (checkpoints / "step-000150" / "state.json").write_text("{}")
    assert store.newest_valid() is not None
    store.save(200, writer(200))
    assert names(checkpoints) == {"step-000100", "step-000200", "latest"}


# ---------------------------------------------------------------- the best, the pinned, and pasts that were left


def scored(directory: Path, *scores: float | None, keep: int = 1) -> set[str]:
    """Checkpoints of steps 1, 2, ... with these scores, each by a process of its own; what is left of them."""
    for step, score in enumerate(scores, start=1):
        CheckpointStore(directory, keep=keep, keep_best=True).save(step, writer(step), score=score)
    return names(directory) - {"latest"}


@pytest.mark.parametrize(
    ("scores", "left"),
    [
        ([3.0, 1.0, 2.0, 4.0], {2, 4}),
        ([1.0, 2.0, 3.0], {1, 3}),
        ([3.0, 2.0, 1.0], {3}),  # the newest is the best
        ([1.0, 1.0, 2.0], {2, 3}),  # of equal ones the newer
        ([1.0, math.nan, math.inf, 2.0], {1, 4}),
        ([None, -1.0, None, None], {2, 4}),
        ([None, None], {2}),
    ],
)
def test_the_best_is_kept_over_restarts(checkpoints: Path, scores: list[float | None], left: set[int]):
    assert scored(checkpoints, *scores) == {f"step-{step:06d}" for step in left}
    assert loaded(checkpoints) == (len(scores), {}), "the newest is what a run resumes from"


def test_the_best_comes_beside_the_newest(checkpoints: Path):
    assert scored(checkpoints, 1.0, 2.0, 3.0, 4.0, keep=2) == {"step-000001", "step-000003", "step-000004"}


def test_a_best_that_was_rolled_back_or_broken_is_not_kept(checkpoints: Path):
    scored(checkpoints, 4.0, 3.0, 1.0, keep=3)
    _truncate(checkpoints / "step-000002")
    store = CheckpointStore(checkpoints, keep=1, keep_best=True)
    _truncate(checkpoints / "step-000003")
    assert store.newest_valid() == Checkpoint(1, checkpoints / "step-000001")
    store.save(4, writer(4), score=5.0)
    assert names(checkpoints) == {"step-000001", "step-000004", "latest"}
    store.save(2, writer(2), score=6.0)
    assert names(checkpoints) == {"step-000001", "step-000002", "latest"}


def test_a_pinned_one_stays_until_it_is_unpinned(checkpoints: Path):
    store = saved(checkpoints, 50, keep=1)
    pin(checkpoints / "step-000050")
    for step in (100, 150):
        store.save(step, writer(step))
    assert names(checkpoints) == {"step-000050", "step-000150", "latest"}
    assert loaded(checkpoints) == (150, {})
    unpin(checkpoints / "step-000050")
    store.save(200, writer(200))
    assert names(checkpoints) == {"step-000200", "latest"}


def test_a_pinned_one_of_a_past_that_was_left_is_never_resumed_from(checkpoints: Path):
    saved(checkpoints, 100, 150)
    pin(checkpoints / "step-000150")
    saved(checkpoints, 120)  # the run went back to 100
    assert names(checkpoints) == {"step-000100", "step-000120", "step-000150", "latest"}
    assert loaded(checkpoints) == (120, {})
    saved(checkpoints, 200, 250)
    assert names(checkpoints) == {"step-000200", "step-000250", "step-000150", "latest"}
    assert loaded(checkpoints) == (250, {})


def test_another_one_of_a_pinned_step_goes_beside_it(checkpoints: Path):
    store = saved(checkpoints, 100, 150)
    pin(checkpoints / "step-000100")
    assert store.save(100, file_writer("other")) == checkpoints / "step-000100.2"
    assert store.save(100, file_writer("another")) == checkpoints / "step-000100.2"
    assert names(checkpoints / "step-000100.2") == {"another", MANIFEST}
    assert os.readlink(checkpoints / "latest") == "step-000100.2"
    found = CheckpointStore(checkpoints).newest_valid()
    assert found == Checkpoint(100, checkpoints / "step-000100.2")
    assert names(checkpoints) == {"step-000100", "step-000100.2", "latest"}


def test_a_checkpoint_without_a_manifest_takes_no_place_among_the_kept(checkpoints: Path):
    store = saved(checkpoints, 100, 150)
    (checkpoints / "step-000150" / MANIFEST).unlink()
    store.save(200, writer(200))
    assert names(checkpoints) == {"step-000100", "step-000200", "latest"}


def test_keep_must_be_positive(checkpoints: Path):
    with pytest.raises(CheckpointError, match="keep must be at least 1"):
        CheckpointStore(checkpoints, keep=0)


# ---------------------------------------------------------------- damage


def _truncate(path: Path) -> None:
    os.truncate(path / "engine" / "weights.bin", 999)


def _flip_bit(path: Path) -> None:
    file = path / "engine" / "weights.bin"
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)


def _change_step(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "step": 150}))


def _newer_schema(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "schema_version": 3}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "engine/weights.bin has 999 bytes instead of 1000"),
        (_flip_bit, "the content of engine/weights.bin is not what was written"),
        (_change_step, "its manifest is of step 150"),
        (_newer_schema, "its schema version is 3, this program reads 1 and 2"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / MANIFEST).unlink(), "manifest.json cannot be read: No such file or directory"),
        (lambda path: os.truncate(path / MANIFEST, 40), "manifest.json is damaged"),
        (lambda path: (path / MANIFEST).write_text("[]"), "manifest.json is damaged"),
        (lambda path: (path / "planted.pt").write_text("x"), "planted.pt is not in the manifest"),
    ],
)
def test_a_broken_checkpoint_is_passed_over_with_the_reason(checkpoints: Path, damage, reason: str):
    saved(checkpoints, 50, 100)
    damage(checkpoints / "step-000100")
    assert loaded(checkpoints) == (50, {"step-000100": reason})


def test_when_all_are_broken_the_run_does_not_start_again_by_itself(checkpoints: Path):
    saved(checkpoints, 50, 100)
    for path in checkpoints.glob("step-*"):
        _flip_bit(path)
    with pytest.raises(CheckpointError, match="every checkpoint of this run is broken"):
        loaded(checkpoints)


def _dangling(latest: Path) -> None:
    latest.unlink()
    latest.symlink_to("step-999999")


def _to_an_older_one(latest: Path) -> None:
    latest.unlink()
    latest.symlink_to("step-000050")


def _directory(latest: Path) -> None:
    latest.unlink()
    shutil.copytree(latest.parent / "step-000050", latest)


@pytest.mark.parametrize("spoil", [_dangling, _to_an_older_one, _directory, Path.unlink])
def test_latest_does_not_decide_and_is_mended(checkpoints: Path, spoil: Callable[[Path], None]):
    store = saved(checkpoints, 50, 100)
    spoil(checkpoints / "latest")
    assert loaded(checkpoints) == (100, {})
    store.save(150, writer(150))
    assert os.readlink(checkpoints / "latest") == "step-000150"


def test_leftovers_are_ignored_on_load_and_removed_by_the_next_save(checkpoints: Path):
    store = saved(checkpoints, 50)
    shutil.copytree(checkpoints / "step-000050", checkpoints / ".tmp-step-000100")
    (checkpoints / ".tmp-latest").symlink_to("step-000100")
    assert loaded(checkpoints) == (50, {})
    store.save(60, writer(60))
    assert names(checkpoints) == {"step-000050", "step-000060", "latest"}


# ---------------------------------------------------------------- failures of writing


def test_too_little_space_is_refused_before_anything_is_written(checkpoints: Path):
    store = saved(checkpoints, 50)
    with pytest.raises(CheckpointError, match=rf"needs about {1 << 60} bytes and \d+ bytes are free"):
        store.save(100, writer(100), expected_bytes=1 << 60)
    assert names(checkpoints) == {"step-000050", "latest"}


def test_the_estimate_is_the_checkpoint_before(checkpoints: Path):
    saved(checkpoints, 50)
    manifest = checkpoints / "step-000050" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"bytes": 1000', f'"bytes": {1 << 60}'))
    with pytest.raises(CheckpointError, match="bytes are free"):
        saved(checkpoints, 100)


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (NumericsError("loss is nan"), NumericsError),
        (TypeError("a fault of ours"), TypeError),
        (RuntimeError("unexpected pos 64 vs 0\nbacktrace"), CheckpointError),
        (OSError(5, "Input/output error"), CheckpointError),
    ],
)
def test_a_failed_write_commits_nothing(checkpoints: Path, raised: Exception, seen: type[Exception]):
    def fail(directory: Path) -> None:
        writer(100)(directory)
        raise raised

    store = saved(checkpoints, 50)
    with pytest.raises(seen) as caught:
        store.save(100, fail)
    assert str(raised).split("\n")[0] in str(caught.value)
    assert "backtrace" not in str(caught.value)
    assert names(checkpoints) == {"step-000050", "latest"}


def test_a_file_called_like_the_manifest_is_refused(checkpoints: Path):
    with pytest.raises(CheckpointError, match=r"cannot hold a file manifest.json"):
        CheckpointStore(checkpoints).save(1, file_writer(MANIFEST))
    assert loaded(checkpoints) == (None, {})


@pytest.mark.parametrize("parent", ["a file", "proc"])
def test_an_unwritable_directory_is_named(tmp_path: Path, parent: str):
    (tmp_path / "file").write_text("x")
    directory = (tmp_path / "file" if parent == "a file" else Path("/proc/sys")) / "run" / "checkpoints"
    with pytest.raises(CheckpointError, match="cannot write the checkpoint of step 1") as caught:
        saved(directory, 1)
    assert str(directory) in str(caught.value)


def save(store: CheckpointStore, step: int, write: Callable[[Path], None], way: str) -> None:
    if way == "at once":
        store.save(step, write)
    else:
        with AsyncSaver(store) as saver:
            saver.save(step, lambda: write)


@pytest.mark.parametrize("way", ["at once", "in the background"])
def test_a_read_only_file_system_is_named_and_its_checkpoints_load(small_disk: Path, way: str):
    store = saved(small_disk / "checkpoints", 50)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(CheckpointError, match=r"step 100: .*Read-only file system") as caught:
        save(store, 100, writer(100), way)
    assert str(small_disk / "checkpoints") in str(caught.value)
    assert loaded(small_disk / "checkpoints") == (50, {})


def test_a_directory_of_another_user_is_named(small_disk: Path):
    saved(small_disk / "checkpoints", 50)
    child = os.fork()
    if child == 0:  # root may write anywhere
        code = 1
        try:
            os.chdir(small_disk)  # from outside that user cannot see it
            os.setuid(65534)
            saved(Path("checkpoints"), 100)
        except CheckpointError as error:
            code = 0 if "Permission denied" in error.what and loaded(Path("checkpoints")) == (50, {}) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("way", ["at once", "in the background"])
@pytest.mark.parametrize("with_torch", [False, True])
def test_a_full_disk_is_explained_and_the_checkpoint_before_loads(small_disk: Path, with_torch: bool, way: str):
    import torch  # here, because the processes of the tests with two ranks import this module

    def too_much(directory: Path) -> None:
        (directory / "first").write_bytes(bytes(1 << 20))
        if with_torch:
            torch.save(torch.zeros(1 << 20), directory / "weights.pt")
        else:
            (directory / "weights.pt").write_bytes(bytes(1 << 22))

    store = saved(small_disk / "checkpoints", 50)
    with pytest.raises(CheckpointError, match=r"step 100: .*\(\d+ bytes were free\)") as caught:
        save(store, 100, too_much, way)
    assert with_torch or "No space left on device" in str(caught.value)
    assert names(small_disk / "checkpoints") == {"step-000050", "latest"}
    assert loaded(small_disk / "checkpoints") == (50, {})
    store.save(150, writer(150))
    assert loaded(small_disk / "checkpoints") == (150, {})


# ---------------------------------------------------------------- two ranks


def _rank(rank: int, directory: Path, barrier, failing: int | None, outcomes) -> None:
    def write(partial: Path) -> None:
        if rank == failing:
            raise OSError(28, "No space left on device")
        (partial / "engine").mkdir(exist_ok=True)
        name = "weights.bin" if rank == 0 else "of-rank-1.bin"
        (partial / "engine" / name).write_bytes(content(100))

    store = CheckpointStore(directory)
    try:
        outcomes.put((rank, str(store.save(100, write, rank=rank, world_size=2, barrier=barrier.wait))))
    except CheckpointError as error:
        outcomes.put((rank, error.what))


def _save_on_two_ranks(directory: Path, failing: int | None) -> dict[int, str]:
    context = multiprocessing.get_context("spawn")
    barrier, outcomes = context.Barrier(2, timeout=60), context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(r, directory, barrier, failing, outcomes)) for r in range(2)]
    for process in ranks:
        process.start()
    result = dict(outcomes.get() for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    return result


def test_two_ranks_write_one_checkpoint(checkpoints: Path):
    outcome = _save_on_two_ranks(checkpoints, failing=None)
    assert outcome == {0: str(checkpoints / "step-000100"), 1: str(checkpoints / "step-000100")}
    assert names(checkpoints / "step-000100" / "engine") == {"weights.bin", "of-rank-1.bin"}
    assert names(checkpoints / "step-000100") == {"engine", MANIFEST}
    assert loaded(checkpoints) == (100, {})


@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_rank_fails_both_raise_and_nothing_is_committed(checkpoints: Path, failing: int):
    saved(checkpoints, 50)
    outcome = _save_on_two_ranks(checkpoints, failing)
    assert "No space left on device" in outcome[failing]
    other = {0: "rank 0 did not commit step 100", 1: "its part was not written by rank 1"}[failing]
    assert other in outcome[1 - failing]
    assert names(checkpoints) == {"step-000050", "latest"}


def test_when_rank_0_cannot_prepare_both_raise(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    outcome = _save_on_two_ranks(tmp_path / "file" / "checkpoints", failing=None)
    assert "Not a directory" in outcome[0]
    assert "rank 0 made no directory" in outcome[1]


def test_a_broken_barrier_does_not_hide_the_first_error(checkpoints: Path):
    def broken() -> None:
        raise RuntimeError("peer is gone")

    with pytest.raises(RuntimeError, match="peer is gone"):
        CheckpointStore(checkpoints).save(1, writer(1), barrier=broken)
    with pytest.raises(CheckpointError, match="bytes are free"):
        CheckpointStore(checkpoints).save(1, writer(1), barrier=broken, expected_bytes=1 << 60)
    assert loaded(checkpoints) == (None, {})
