"""How contenders and the harness take turns: see `contenders.py`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Gate:
    """Lets as many steps pass as the harness asks for, and tells it what they took."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._left, self._tokens, self._losses, self._parts = 0, 0, list[float](), dict[str, float]()

    def open(self) -> None:
        """Everything is loaded; the first step is next."""
        _reset_peak_memory()
        self._start_bytes = _memory("VmRSS")
        self._answer({})
        self._wait()

    def took(self, tokens: int) -> None:
        """Tokens that are not padding, of a batch of this step."""
        self._tokens += tokens

    def spent(self, parts: dict[str, float]) -> None:
        """What part of this step took how many seconds."""
        for name, seconds in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + seconds

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        self.spent({name: time.perf_counter() - since})

    def step(self, loss: float) -> None:
        """A step is done. Returns when the next one may begin."""
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            seconds, cpu_seconds = time.perf_counter() - self._since, time.process_time() - self._cpu_since
            answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": self._tokens, "losses": self._losses}
            answer["parts"] = self._parts
            self._answer(answer | {"peak_bytes": _memory("VmHWM"), "start_bytes": self._start_bytes})
            self._wait()

    def _answer(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self._answers, flush=True)

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:  # nothing is left to clean up: every contender works in a temporary folder
            os._exit(0)
        self._left, self._tokens, self._losses, self._parts = int(line), 0, [], {}
        self._since, self._cpu_since = time.perf_counter(), time.process_time()


def _memory(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class AtGate:
    """The run's own trackers, and then the gate."""

    def __init__(self, inner: Any, gate: Gate, loss: str):
        self.inner, self.gate, self.loss = inner, gate, loss

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def samples(self, step: int, records: list[dict[str, Any]]) -> None:
        self.inner.samples(step, records)
        self.gate.took(sum(sum(record["loss_mask"]) for record in records))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.inner.log(step, metrics)
        timings = {name: seconds for name, seconds in metrics.items() if name.startswith("timing_s/")}
        self.gate.spent({name.removeprefix("timing_s/"): seconds for name, seconds in timings.items()})
        self.gate.step(metrics[self.loss])
