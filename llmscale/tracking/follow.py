"""Showing here what another process writes into the run directory, which is the truth about a run wherever it trains."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmscale.tracking.jsonl import EVENTS, METRICS

if TYPE_CHECKING:
    from llmscale.protocols import Tracker

POLL_S = 0.5


@contextmanager
def following(run_dir: Path, tracker: Tracker) -> Iterator[None]:
    """Pass every record of metrics.jsonl and events.jsonl that appears while the context is open on to `tracker`."""
    stop = threading.Event()
    tails = [_Tail(run_dir / METRICS), _Tail(run_dir / EVENTS)]

    def follow() -> None:
        while not stop.wait(POLL_S):
            _pass_on(tails, tracker)
        _pass_on(tails, tracker)

    thread = threading.Thread(target=follow, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _pass_on(tails: list[_Tail], tracker: Tracker) -> None:
    for record in (record for tail in tails for record in tail.new_records()):
        record.pop("time_s", None)
        if "step" in record and "kind" not in record:
            tracker.log(record.pop("step"), {k: v for k, v in record.items() if isinstance(v, int | float)})
        elif record.get("kind") == "finished":
            tracker.finish(record["status"])
        else:
            tracker.event(record.pop("kind"), **record)


class _Tail:
    """The whole lines that were added to a file since the last look; a file that was cut is read from its new end."""

    def __init__(self, path: Path):
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def new_records(self) -> list[dict]:
        if not self._path.exists():
            return []
        self._position = min(self._position, self._path.stat().st_size)
        with self._path.open("rb") as file:
            file.seek(max(self._position - 1, 0))
            if self._position and file.read(1) != b"\n":  # it was cut, and has grown again beyond where we were
                self._position += len(file.readline())
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._position += len(whole)
        return [json.loads(line) for line in whole.splitlines()]
