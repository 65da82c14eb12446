"""Pools of one worker in this process: the same calls, done at once. For debugging and for one small device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from llmscale.cluster.pool import Instead, Rest, WorkerPool


@dataclass
class Done:
    results: list[Any]

    def wait(self) -> list[Any]:
        return self.results


class LocalPool(WorkerPool):
    num_workers = 1
    ahead = 1

    def __init__(self, role: str, build: Callable[[], Any]):
        self.role, self.worker = role, build()

    @property
    def members(self) -> list[str]:
        return [self.role]

    def call(self, method: Callable[..., Any], *args: Any) -> Done:
        return Done([method(self.worker, *args)])

    def install(self, method: Callable[..., Any], *args: Any) -> Done:
        return self.call(method, *args)

    def map(self, method: Callable[..., Any], items: Sequence[Any]) -> Done:
        return Done(method(self.worker, list(items)))

    def submit(
        self, method: Callable[..., Any], *args: Any, instead: Instead | None = None, rest: Rest | None = None
    ) -> Future[Any]:
        given = [arg.result() if isinstance(arg, Future) else arg for arg in args]
        result = method(self.worker, *given)
        while rest is not None and (more := rest(*given, result)) is not None:
            given = [more]
            result = method(self.worker, *given)
        task: Future[Any] = Future()
        task.set_result(result)
        return task

    def aside(self, method: Callable[..., Any], *args: Any) -> None:
        """Here nothing goes on meanwhile."""
