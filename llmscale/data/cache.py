"""Tokenized data on disk: flat arrays, built once, read through memory maps by every process and every later run.

    <cache_dir>/<key>/NAME.bin     one array, raw, little-endian
    <cache_dir>/<key>/arrays.json  format version, type and size of each array, and facts about the whole
    <cache_dir>/<key>.lock         held by the one process that builds; the others wait for it
    <cache_dir>/digests/           of source files, by their times

The directory appears under its name complete and on disk, or not at all. One that is cut short or of another format is
built again.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike

from llmscale.checkpoint.durable import atomic_write_text, commit_directory
from llmscale.errors import DataError, RunError

FORMAT = 2  # raise it when what is stored, or how a record becomes tokens, changes
_INDEX = "arrays.json"
_DIGEST_BYTES = 16
_SETTLED_AFTER_S = 3.0  # a file that changes twice within the clock's grain looks as if it had not
_TELL_AFTER_S = 2.0
_TRY_EVERY_S = 0.05


@dataclass(frozen=True)
class Stored:
    arrays: dict[str, np.ndarray]  # flat, memory-mapped, not to be written to
    facts: dict[str, Any]


class ArrayWriter:
    """Grows several flat arrays on disk; only a buffer of each is in memory."""

    def __init__(self, directory: Path, dtypes: Mapping[str, type]):
        self._directory = directory
        self._dtypes = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in dtypes.items()}
        self._files = {name: (directory / f"{name}.bin").open("wb") for name in dtypes}
        self.sizes = dict.fromkeys(dtypes, 0)

    def append(self, name: str, values: ArrayLike) -> None:
        array = np.asarray(values, dtype=self._dtypes[name])
        self._files[name].write(array.tobytes())
        self.sizes[name] += len(array)

    def finish(self, facts: Mapping[str, Any]) -> None:
        self.close()
        arrays = {name: [dtype.str, self.sizes[name]] for name, dtype in self._dtypes.items()}
        index = {"format": FORMAT, "arrays": arrays, "facts": facts}
        (self._directory / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def digest(*parts: Any) -> str:
    """A name for JSON values: other values, another name."""
    return blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=_DIGEST_BYTES).hexdigest()


def content_digest(path: Path, cache_dir: Path) -> str:
    """Of the bytes of a file. It is remembered as long as nothing touches the file: reading terabytes takes a while.

    Raises: DataError for a file that cannot be read.
    """
    try:
        stat = path.stat()
        touched = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        remembered = cache_dir / "digests" / digest(str(path.resolve()), touched)
        with suppress(OSError):
            if len(text := remembered.read_text()) == 2 * _DIGEST_BYTES:
                return text
        with path.open("rb") as file:
            found = file_digest(file, lambda: blake2b(digest_size=_DIGEST_BYTES)).hexdigest()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_AFTER_S:
        with suppress(OSError):  # it was only for speed
            remembered.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(remembered, found)
    return found


def stored_once(cache_dir: Path, key: str, build: Callable[[Path], None], source: str) -> Stored:
    """What `build` writes into the directory that it is given (an ArrayWriter, finished), or has written before. Of several
    processes one builds and the others wait; `source` is named to them.

    Raises: RunError when the folder cannot be used, and whatever `build` raises.
    """
    try:
        found = _read(cache_dir / key)
        if found is not None:
            return found
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{key}.lock", source):
            found = _read(cache_dir / key)
            if found is None:
                commit_directory(cache_dir / key, build)
                found = _read(cache_dir / key)
    except OSError as error:
        what = f"tokenized data cannot be kept here: {error.strerror or error} ({error.filename or cache_dir})"
        fix = "Name a folder with free space, on a file system with flock, in data.cache_dir."
        raise RunError(what, where=str(cache_dir), fix=fix) from error
    if found is None:
        raise RunError("what was just written here is not there", where=str(cache_dir / key), fix="Check this disk.")
    return found


def _read(directory: Path) -> Stored | None:
    """None where nothing complete of this format is."""
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            return None
        arrays = {name: _mapped(directory / f"{name}.bin", *kind) for name, kind in index["arrays"].items()}
        return Stored(arrays, index["facts"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _mapped(path: Path, dtype: str, size: int) -> np.ndarray:
    """Raises: ValueError for a file of another size."""
    if path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is cut short")
    if size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))  # as a plain array: slicing a np.memmap takes 4 times as long


@contextmanager
def _locked(path: Path, source: str) -> Iterator[None]:
    with path.open("a+", encoding="utf-8") as file:
        _wait_for(file, source)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _wait_for(file: IO[str], source: str) -> None:
    tell_at: float | None = time.monotonic() + _TELL_AFTER_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if tell_at is not None and time.monotonic() > tell_at:
                tell_at = None
                file.seek(0)
                holder = file.read() or "another process"
                print(f"waiting for {holder}, which tokenizes {source}", file=sys.stderr, flush=True)
            time.sleep(_TRY_EVERY_S)
