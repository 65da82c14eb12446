"""Files of tensors: read back by safetensors, to the last bit, whatever their size and whatever the file system can do."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llmscale.checkpoint import tensors
from llmscale.checkpoint.manifest import digest
from llmscale.checkpoint.tensors import save_tensors

BLOCK, PAGE = tensors.BLOCK_BYTES, 4096
SIZES = {  # bytes of each tensor
    "nothing": [],
    "an empty one": [0, 4],
    "less than a page": [4, 400, 12],
    "whole blocks": [BLOCK, 2 * BLOCK],
    "across blocks": [BLOCK - PAGE, 3 * PAGE + 4, 2 * BLOCK + 8, 4],
}


def made(sizes: list[int]) -> dict[str, torch.Tensor]:
    return {f"layer.{i}|weight": torch.arange(size // 4, dtype=torch.float32) + i for i, size in enumerate(sizes)}


def assert_read_back(path: Path, written: dict[str, torch.Tensor], digested: str) -> None:
    assert digested == digest(path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"num_steps": "8", "of": 'a "quoted" ü'}
        assert set(file.keys()) == set(written)
        for name, value in written.items():
            assert torch.equal(file.get_tensor(name), value), name


def save(path: Path, written: dict[str, torch.Tensor]) -> str:
    return save_tensors(path, written, {"num_steps": "8", "of": 'a "quoted" ü'})


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_safetensors_reads_every_bit_of_it(tmp_path: Path, sizes: list[int]):
    written = made(sizes)
    assert_read_back(tmp_path / "file", written, save(tmp_path / "file", written))


@pytest.mark.parametrize("way", ["when it is asked for", "when it is written"])
def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str):
    refused = []

    def refuse(descriptor: int) -> None:
        refused.append(descriptor)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def set_flags(descriptor: int, command: int, flags: int = 0, /, real=fcntl.fcntl) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            refuse(descriptor)
        return real(descriptor, command, flags)

    def pwrite(descriptor: int, content: memoryview, offset: int, /, real=os.pwrite) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refuse(descriptor)
        return real(descriptor, content, offset)

    if way == "when it is asked for":
        monkeypatch.setattr(fcntl, "fcntl", set_flags)
    else:
        monkeypatch.setattr(os, "pwrite", pwrite)
    written = made(SIZES["across blocks"])
    digested = save(tmp_path / "file", written)
    monkeypatch.undo()
    assert len(refused) == 1
    assert_read_back(tmp_path / "file", written, digested)


def test_a_write_that_fails_is_raised(tmp_path: Path):
    """Also where it fails half-way: here at the largest size that a file may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BLOCK + 3 * PAGE + 100, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path / "file", made(SIZES["across blocks"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_nothing_is_left_of_a_longer_file(tmp_path: Path):
    save(tmp_path / "file", made(SIZES["across blocks"]))
    written = made(SIZES["less than a page"])
    assert_read_back(tmp_path / "file", written, save(tmp_path / "file", written))
