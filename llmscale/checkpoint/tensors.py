"""Writing a safetensors file past the page cache.

Through the page cache every byte is copied into pages that the system first has to find, and goes to disk only after that. A
direct write takes it from where it lies, which is several times as fast on ext4 and costs a tenth of the processor's time. It
needs whole pages: tensors pass through two blocks, one of which is filled and digested while the other is written. Where a file
system knows no direct writes (tmpfs, some network ones) the same blocks are written the usual way.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmscale.checkpoint.manifest import new_digest
from llmscale.checkpoint.task import Task

BLOCK_BYTES = 8 << 20  # whole pages; smaller ones are slower, larger ones no faster


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write contiguous fp32 tensors of the CPU and text beside them into a file; returns its digest. The format: eight
    bytes with the length of a header, little-endian, the header as JSON, the tensors one after another
    (https://github.com/huggingface/safetensors). After an fsync it is on disk, as ever.

    Raises: OSError when it cannot be written.
    """
    entries: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype is torch.float32 and tensor.is_contiguous(), name
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    header += b" " * (-len(header) % 8)  # tensors are read in place, which wants them aligned
    head = len(header).to_bytes(8, "little") + header
    content = (tensor.numpy().data.cast("B") for tensor in tensors.values() if len(tensor))
    return _write(path, [memoryview(head), *content])


def _write(path: Path, content: Iterable[memoryview]) -> str:
    digest, num_bytes = new_digest(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with suppress(OSError):  # the file system has no direct writes
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
        writing = Task(lambda: None)
        try:
            for block, filled in _blocks(content):
                digest.update(block[:filled])
                writing.result()
                pages = block[: -(-filled // mmap.PAGESIZE) * mmap.PAGESIZE]
                writing = Task(partial(_write_pages, descriptor, pages, num_bytes))
                num_bytes += filled
        finally:
            writing.wait()
        writing.result()
        os.ftruncate(descriptor, num_bytes)  # the last page is not full
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _blocks(content: Iterable[memoryview]) -> Iterator[tuple[memoryview, int]]:
    """The content in blocks, each with how many of its bytes are filled: all but the last in full. Two take turns: the one
    before the last is filled again."""
    blocks = [memoryview(mmap.mmap(-1, BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)) for _ in range(2)]
    filled = 0
    for part in content:
        while part:
            taken = min(len(part), BLOCK_BYTES - filled)
            blocks[0][filled : filled + taken] = part[:taken]
            part, filled = part[taken:], filled + taken
            if filled == BLOCK_BYTES:
                yield blocks[0], filled
                blocks.reverse()
                filled = 0
    if filled:
        yield blocks[0], filled


def _write_pages(descriptor: int, pages: memoryview, offset: int) -> None:
    while pages:
        try:
            done = os.pwrite(descriptor, pages, offset)
        except OSError as error:
            direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
            if error.errno != errno.EINVAL or not direct:
                raise
            fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)  # no direct writes after all, or not of pages of this size
        else:
            pages, offset = pages[done:], offset + done
