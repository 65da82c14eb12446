"""Manifests and digests: what older ones say is still understood, and every file is read to its last byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import xxhash

from llmscale.checkpoint.commit import CheckpointStore
from llmscale.checkpoint.manifest import MANIFEST, Checkpoint, digest, read_manifest, verify, verify_names
from llmscale.errors import CheckpointError


def write(directory: Path) -> None:
    (directory / "engine").mkdir()
    (directory / "engine" / "weights.bin").write_bytes(bytes(range(256)) * 9000)  # larger than any read buffer
    (directory / "empty").touch()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    store = CheckpointStore(tmp_path)
    return Checkpoint(7, store.save(7, write, score=0.25))


def as_version_1(checkpoint: Checkpoint) -> None:
    """Give it the manifest that the first version of the program wrote."""
    files = {
        name: {
            "bytes": (checkpoint.path / name).stat().st_size,
            "blake2b": hashlib.blake2b((checkpoint.path / name).read_bytes()).hexdigest(),
        }
        for name in ("empty", "engine/weights.bin")
    }
    manifest = {"schema_version": 1, "step": checkpoint.step, "files": files}
    (checkpoint.path / MANIFEST).write_text(json.dumps(manifest))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_digest_is_that_of_the_published_algorithm(checkpoint: Checkpoint):
    file = checkpoint.path / "engine" / "weights.bin"
    assert digest(file) == xxhash.xxh3_128(file.read_bytes()).hexdigest()
    assert verify(checkpoint).files["engine/weights.bin"].digest == digest(file)


def test_the_manifest_comes_back(checkpoint: Checkpoint, tmp_path: Path):
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.number, manifest.score, manifest.num_bytes) == (7, 1, 0.25, 256 * 9000)
    again = CheckpointStore(tmp_path).save(5, write)
    assert read_manifest(Checkpoint(5, again)).number == 2
    assert read_manifest(Checkpoint(5, again)).score is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("at", [0, 1_000_000, 256 * 9000 - 1])
def test_a_flipped_bit_is_found_wherever_it_is(checkpoint: Checkpoint, version: int, at: int):
    if version == 1:
        as_version_1(checkpoint)
    verify(checkpoint)
    flip(checkpoint.path / "engine" / "weights.bin", at)
    verify_names(checkpoint)  # which does not read it
    with pytest.raises(CheckpointError, match=r"the content of engine/weights\.bin is not what was written"):
        verify(checkpoint)


def test_a_run_goes_on_from_checkpoints_of_version_1(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        as_version_1(Checkpoint(step, store.save(step, write)))
    assert CheckpointStore(tmp_path).newest_valid() == Checkpoint(20, tmp_path / "step-000020")
    store.save(30, write)
    assert [c.step for c in store.checkpoints()] == [30, 20]
    assert store.newest_valid() == Checkpoint(30, tmp_path / "step-000030")


def test_a_file_that_was_taken_away_while_it_was_read_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    names = verify_names(checkpoint)
    (checkpoint.path / "empty").unlink()
    monkeypatch.setattr("llmscale.checkpoint.manifest.verify_names", lambda _: names)
    with pytest.raises(CheckpointError, match=r"it cannot be read: .*empty"):
        verify(checkpoint)
