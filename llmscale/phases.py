"""What this process is doing: named phases, nested as they are entered, how long each took, and when one last ended.

    with phase("step"):
        with phase("forward"): ...      # its path is step/forward

A phase costs a microsecond or two. The watchdog (`training/watchdog.py`) reads from its own thread what hangs and for how
long; the training loop takes the seconds that were spent. On a CUDA device a phase ends when its kernels are launched, not
when they are done, so that only phases that wait for the device (a whole step, a save) tell the truth about time there.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

_open: dict[int, list[phase]] = {}  # by thread, outermost first
_spent_s: dict[str, float] = {}
_last_end_s = time.monotonic()


class phase:
    """`detail` is shown when something hangs here, and only made into text then."""

    __slots__ = ("detail", "name", "path", "started_s")
    path: str
    started_s: float

    def __init__(self, name: str, detail: Any = None):
        self.name, self.detail = name, detail

    def __enter__(self) -> None:
        stack = _open.setdefault(threading.get_ident(), [])
        self.path = f"{stack[-1].path}/{self.name}" if stack else self.name
        stack.append(self)
        self.started_s = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        global _last_end_s
        _last_end_s = time.monotonic()
        _spent_s[self.path] = _spent_s.get(self.path, 0.0) + _last_end_s - self.started_s
        stack = _open[threading.get_ident()]
        stack.pop()
        if not stack:
            del _open[threading.get_ident()]  # idents are used again


def take_spent_s() -> dict[str, float]:
    """Path -> seconds in phases that ended since the last call."""
    spent = dict(_spent_s)
    _spent_s.clear()
    return spent


def last_end_s() -> float:
    """`time.monotonic()` when a phase last ended."""
    return _last_end_s


def describe() -> str:
    """What every thread is in, as in `step > all_reduce (num_tokens), for 12 s`."""
    return _describe(list(_open.values()))


def describe_main() -> str:
    """The same of the main thread alone."""
    return _describe([_open.get(threading.main_thread().ident or 0, [])])


def _describe(stacks: list[list[phase]]) -> str:
    now = time.monotonic()
    threads = [list(stack) for stack in stacks]
    return "; ".join(
        f"{' > '.join(p.name + (f' ({_text(p.detail)})' if p.detail else '') for p in stack)}, "
        f"for {now - stack[-1].started_s:.0f} s"
        for stack in threads
        if stack
    )


def _text(detail: Any) -> str:
    return detail if isinstance(detail, str) else ", ".join(map(str, detail))
