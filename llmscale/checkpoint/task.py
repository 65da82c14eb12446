"""A function that runs beside the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """Runs `function` in a thread of its own from now on.

    Not an executor and no daemon: a program that ends waits for a plain thread, gives an executor no more work, and
    stops a daemon in the middle.
    """

    def __init__(self, function: Callable[[], T]):
        self._returned: list[T] = []
        self._raised: BaseException | None = None
        self._ended = threading.Event()  # Thread.join, once interrupted, takes the thread for ended (Python 3.11)
        threading.Thread(target=self._run, args=(function,)).start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it has ended, by then."""
        return self._ended.wait(timeout_s)

    def result(self) -> T:
        """Wait for the function, then return or raise what it did."""
        self.wait()
        if self._raised is not None:
            raise self._raised
        return self._returned[0]

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._returned.append(function())
        except BaseException as error:
            self._raised = error
        finally:
            self._ended.set()
