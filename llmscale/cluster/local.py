"""Pools of one worker in this process: the same calls, done at once. For debugging and for one small device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Done:
    results: list[Any]

    def wait(self) -> list[Any]:
        return self.results


class LocalPool:
    num_workers = 1

    def __init__(self, role: str, build: Callable[[], Any]):
        self.role, self.worker = role, build()
        self.members = [role]

    def call(self, method: Callable[..., Any], *args: Any) -> Done:
        return Done([method(self.worker, *args)])

    def map(self, method: Callable[..., Any], items: Sequence[Any]) -> Done:
        return Done(method(self.worker, list(items)))

    def units(self, method: Callable[..., Any], units: Sequence[Any]) -> Done:
        return Done([method(self.worker, unit) for unit in units])

    def stream(self, method: Callable[..., Any], units: Iterable[Any]) -> Iterator[Any]:
        return (method(self.worker, unit) for unit in units)
