"""Reads a `.wandb` file, W&B's transaction log: protobuf records in the framing of LevelDB logs.

A 7-byte head (":W&B", magic, version), then blocks of 32 KiB. A block is a row of chunks, each with a header of
checksum, length and kind; a record is one whole chunk or a first, some middle and a last one. Less room than a header
at the end of a block stays empty.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

HEAD, CHUNK, BLOCK_BYTES = struct.Struct("<4sHB"), struct.Struct("<IHB"), 32768
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbFile:
    """What the tests ask about a run."""

    run_id: str = ""
    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # history; nested keys joined by dots
    axes: dict[str, str] = field(default_factory=dict)  # metric or pattern -> the metric that it is drawn over
    exit_code: int | None = None  # None: the run never ended cleanly


def read_wandb(path: Path) -> WandbFile:
    found = WandbFile()
    for blob in _blobs(path.read_bytes()):
        record = pb.Record()  # type: ignore[attr-defined]
        record.ParseFromString(blob)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run_id, found.project, found.name = record.run.run_id, record.run.project, record.run.display_name
            found.group, found.job_type = record.run.run_group, record.run.job_type
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found.rows.append({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
        elif kind == "metric" and record.metric.step_metric:
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _blobs(data: bytes) -> Iterator[bytes]:
    """The records of a log; a torn end is left out, any other damage fails."""
    ident, magic, _ = HEAD.unpack_from(data)
    assert (ident, magic) == (b":W&B", 0xBEE1)
    position = HEAD.size
    parts: list[bytes] = []
    while position < len(data):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < CHUNK.size:
            position += room
            continue
        if position + CHUNK.size > len(data):
            return
        checksum, length, kind = CHUNK.unpack_from(data, position)
        chunk = data[position + CHUNK.size : position + CHUNK.size + length]
        if len(chunk) < length:
            return
        assert zlib.crc32(chunk, zlib.crc32(bytes([kind]))) == checksum, f"damaged at byte {position}"
        assert (kind in (WHOLE, FIRST)) == (not parts), f"chunk of kind {kind} out of place at byte {position}"
        parts.append(chunk)
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []
        position += CHUNK.size + length
