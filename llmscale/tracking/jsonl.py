"""The truth about a run: three files of JSON lines in its directory.

    metrics.jsonl   {"step", "time_s", <metric>: number, ...}   one record for each call of `log`
    samples.jsonl   {"step", "time_s", <field>: value, ...}     one record for each sample
    events.jsonl    {"time_s", "kind", <detail>: value, ...}    what happened and why; only ever grows

`time_s` is Unix time. JSON has no NaN or infinity: such a number is written as null, and the record's field
"nonfinite" says which it was, as in {"train/loss": null, "nonfinite": {"train/loss": "nan"}}.

A run that resumes from a checkpoint repeats the steps after it, so their records are cut off first. A crash can leave
half a record at the end of a file; it is dropped.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmscale.disk import is_full, patiently
from llmscale.errors import DataError, DiskFullError, LlmscaleError, RunError

METRICS, SAMPLES, EVENTS = "metrics.jsonl", "samples.jsonl", "events.jsonl"


class JsonlTracker:
    """Appends to the files in `directory`; every record has reached the operating system when a call returns.

    `resume_step` is the step of the checkpoint that the run starts from: records of later steps are cut off.
    -1 starts from nothing, so that a record of step 0 goes too.

    Raises: RunError when a file cannot be written, DataError when one is damaged before its last line.
    """

    def __init__(self, directory: Path, resume_step: int):
        def is_kept(record: Mapping[str, Any]) -> bool:
            return bool(record.get("step", -1) <= resume_step)

        self._files = {name: RecordFile(directory / name, is_kept, self.event) for name in (METRICS, SAMPLES)}
        self._files[EVENTS] = RecordFile(directory / EVENTS, event=self.event)
        dropped = {name: file.num_dropped for name, file in self._files.items()}
        if any(dropped.values()):
            self.event("records_cut", resume_step=resume_step, metrics=dropped[METRICS], samples=dropped[SAMPLES])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._files[METRICS].append([{"step": step, "time_s": _now_s(), **metrics}])

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        self._files[SAMPLES].append([{"step": step, "time_s": _now_s(), **record} for record in records])

    def event(self, kind: str, **details: Any) -> None:
        self._files[EVENTS].append([{"time_s": _now_s(), "kind": kind, **details}])

    def finish(self, status: str) -> None:
        self.event("finished", status=status)
        for file in self._files.values():
            file.close()


class RecordFile:
    """A file of JSON lines to append to, from any thread; what was appended has reached the operating system when the call
    returns, and the disk after `sync` or `close`. Opened again, it loses half a record at its end and every record that is
    not `is_kept`. `event` is told of waits for space on the disk.

    Raises: DiskFullError when there was no space for too long, RunError when it cannot be written, DataError when it is damaged
    before its last line.
    """

    def __init__(
        self,
        path: Path,
        is_kept: Callable[[Mapping[str, Any]], bool] = lambda record: True,
        event: Callable[..., None] = lambda kind, **details: None,
    ):
        self.path, self.event = path, event
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.num_dropped = _cut(path, is_kept)  # whole records
            self._file = path.open("ab", buffering=0)
            self._pending = b""  # what a full disk did not take yet
        except OSError as error:
            raise self._not_writable(error) from error

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        # A lone surrogate in decoded text becomes its \u escape, which is what JSON wants.
        lines = "".join(_to_line(record) for record in records).encode("utf-8", "backslashreplace")
        waited: list[float] = []
        try:
            with self._lock:
                self._pending += lines
                patiently(self._write, self.path.parent, waited.append)
        except OSError as error:
            raise self._not_writable(error) from error
        for seconds in waited:
            self.event("disk_full", at=self.path.name, seconds=seconds)

    def sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_writable(error) from error

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _write(self) -> None:
        """It goes on where it was when the disk was full."""
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def _not_writable(self, error: OSError) -> LlmscaleError:
        fix = "Free some space or choose another run directory; the same command then resumes."
        kind = DiskFullError if is_full(error) else RunError
        return kind(f"cannot write the run's records: {error}", where=str(self.path.parent), fix=fix)


def append_event(directory: Path, kind: str, **details: Any) -> None:
    """One event in the file of a run whose own tracker is gone, as after the death of the process that had it."""
    line = _to_line({"time_s": _now_s(), "kind": kind, **details})

    def write() -> None:
        _cut(directory / EVENTS, lambda record: True)  # half a line too, that this may have left
        with (directory / EVENTS).open("a", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(line)

    patiently(write, directory)


def iter_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, without half a record that a crash or a writer at work left at its end.

    Raises: DataError for a line before the last that is not a JSON object.
    """
    return (record for _, record in _records(path))


def iter_located(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same, each with the byte where its line begins."""
    offset = 0
    for line, record in _records(path):
        yield offset, record
        offset += len(line)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return list(iter_jsonl(path))


def last_metrics(run_dir: Path) -> dict[str, float]:
    """The metrics of the last step that logged any; a step may have logged several times."""
    path = run_dir / METRICS
    records = read_jsonl(path) if path.exists() else []
    last: dict[str, float] = {}
    for record in records:
        last |= record if record["step"] == records[-1]["step"] else {}
    return {name: value for name, value in last.items() if name not in ("step", "time_s")}


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines as they stand in the file, and their objects."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if not file.read(1):
                    return
                fix = "Remove that line; the others are whole."
                raise DataError("not a JSON object", where=f"{path}:{number}", fix=fix) from error
            yield line, record


def _cut(path: Path, is_kept: Callable[[Mapping[str, Any]], bool]) -> int:
    """Drop a torn end and the records that are not kept; returns how many whole records went."""
    if not path.exists():
        return 0
    temporary = path.with_name(path.name + ".tmp")
    dropped = 0
    try:
        with temporary.open("wb") as file:
            for line, record in _records(path):
                if is_kept(record):
                    file.write(line.rstrip(b"\n") + b"\n")
                else:
                    dropped += 1
            file.flush()
            os.fsync(file.fileno())
        if temporary.stat().st_size != path.stat().st_size:
            temporary.replace(path)
            _fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return dropped


def _fsync_directory(directory: Path) -> None:
    """A rename survives a power failure only once its directory is on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _now_s() -> float:
    return round(time.time(), 3)


def _to_line(record: Mapping[str, Any]) -> str:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError):  # something in it is not JSON's; looking for it takes 30 times as long
        pass
    nonfinite: dict[str, str] = {}
    plain = _to_json(record, "", nonfinite)
    if nonfinite:
        plain["nonfinite"] = nonfinite
    return json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"


def _to_json(value: Any, path: str, nonfinite: dict[str, str]) -> Any:
    """`value` in JSON's types; `nonfinite` collects the dotted path of each number that JSON cannot hold."""
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _to_json(v, f"{path}.{k}" if path else str(k), nonfinite) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(v, f"{path}.{i}", nonfinite) for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[path] = str(value)
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
