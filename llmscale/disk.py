"""Disks that are full for a while: writes that can be made again wait for space instead of ending a run."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from llmscale.errors import DiskFullError

PATIENCE_S = 300.0
PAUSE_S = 1.0  # between two tries
FULL = (errno.ENOSPC, errno.EDQUOT)
# As libraries write it whose errors carry no number.
IN_WORDS = ("No space left on device", "Disk quota exceeded")

T = TypeVar("T")
_in_vain: set[Path] = set()  # directories that were waited for


def is_full(error: BaseException | None) -> bool:
    """Whether this, or what it came from, is for want of space."""
    while error is not None:
        if isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in FULL):
            return True
        if any(words in str(error) for words in IN_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def explaining_full(directory: Path) -> Iterator[None]:
    """Raises: DiskFullError in place of whatever says that there is no space; it means the same in every process."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not is_full(error):
            raise
        what = f"no space is left on the disk of {directory}"
        fix = "Free some space; the same command then resumes, and what was saved is untouched."
        raise DiskFullError(what, where=str(directory), fix=fix) from error


def patiently(write: Callable[[], T], directory: Path, told: Callable[[float], None] = lambda seconds: None) -> T:
    """`write`, and the whole of it again for as long as the disk of `directory` is full, at most PATIENCE_S. `told` hears how
    long that was, when it is over. After a wait in vain nothing is waited for until a write has gone well: a run that ends
    for want of space ends soon.

    Raises: what `write` raised last.
    """
    started: float | None = None
    while True:
        try:
            result = write()
        except Exception as error:
            if not is_full(error) or directory in _in_vain:
                raise
            if started is None:
                started = time.monotonic()
                what = f"no space is left on the disk of {directory}: waiting for some, at most {PATIENCE_S:.0f} s"
                print(what, file=sys.stderr, flush=True)
            elif time.monotonic() - started > PATIENCE_S:
                _in_vain.add(directory)
                raise
            time.sleep(PAUSE_S)
        else:
            _in_vain.discard(directory)
            if started is not None:
                told(round(time.monotonic() - started, 2))
            return result
