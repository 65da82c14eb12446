"""Ends a rank where nothing moves any more, and says what it was doing and which of its peers fell silent.

A rank that hangs, in a collective whose peer is gone or on a disk that does not answer, would keep its machine until somebody
looks. Each rank writes a line about itself into the run directory from a thread, so that the one that gives up can
tell who is late: a peer that is stopped or whose host is dead writes nothing, one that is stuck says where. Ending the
process closes its connections, which ends its peers too; whoever started them all starts them again.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmscale import phases
from llmscale.distributed import World

FOLDER = ".ranks"  # in the run directory; one file a rank
GAVE_UP = "gave up: "
EXIT_CODE = 1
LAST_WORDS_S = 10.0  # longest time for them
SHOWN, TEXT = 8, 160  # peers in the message, and characters of each


class Watchdog:
    """While the context is open: when no phase has ended for `timeout_s`, this process ends with EXIT_CODE. `step` says how
    far it is; `report` is told what the log is told too."""

    def __init__(
        self,
        role: str,
        world: World,
        run_dir: Path,
        timeout_s: float,
        *,
        step: Callable[[], int],
        report: Callable[[str], None],
    ):
        self._role, self._world, self._folder = role, world, run_dir / FOLDER
        self._timeout_s, self._tick_s = timeout_s, min(timeout_s / 10, 10.0)
        self._step, self._report = step, report
        self._closed = threading.Event()

    def __enter__(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._write(self._doing())
        for task in (self._watch, self._tell):  # two threads: what watches must not wait for a disk
            threading.Thread(target=task, name="watchdog", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        def look(idle_s: float) -> None:
            if idle_s > self._timeout_s:
                end_process(lambda: self._give_up(idle_s))

        watch_idleness(self._closed, phases.last_end_s, self._tick_s, look)

    def _tell(self) -> None:
        while not self._closed.wait(self._tick_s):
            self._write(self._doing())

    def _doing(self) -> str:
        return f"step {self._step()}: {phases.describe() or 'between phases'}"

    def _give_up(self, idle_s: float) -> None:
        moved = f"nothing has moved for {idle_s:.0f} s (cluster.stall_timeout_s)"
        said = f"{self._role} {self._world.rank}: {moved}; {self._doing()}"
        self._closed.set()
        self._write(f"{GAVE_UP}{said}")
        text = "; ".join([said, *self._peers()])
        self._write(f"{GAVE_UP}{text}")
        print(f"{text}\nWhere each thread stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._report(text)

    def _write(self, text: str) -> None:
        record = {"time_s": time.time(), "pid": os.getpid(), "host": socket.gethostname(), "text": text}
        file = _file(self._folder, self._world.rank)
        partial = file.with_suffix(".tmp")
        with suppress(OSError):  # a full disk is a matter for whoever trains
            partial.write_text(json.dumps(record), encoding="utf-8")
            partial.replace(file)

    def _peers(self) -> list[str]:
        """What the others last said, the silent ones first."""
        said: list[tuple[float, str]] = []
        for rank in range(self._world.size):
            record = _read(self._folder, rank) if rank != self._world.rank else None
            if record is None:
                continue
            age_s = time.time() - record["time_s"]
            silent = f"has been silent for {age_s:.0f} s, " if age_s > 4 * self._tick_s else ""
            who = f"{self._role} {rank} (pid {record['pid']} on {record['host']})"
            said.append(
                (-age_s if silent else 0.0, f"{who} {silent}was in {record['text'].removeprefix(GAVE_UP)[:TEXT]}")
            )
        lines = [line for _, line in sorted(said)]
        return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])


def watch_idleness(
    closed: threading.Event, last_move_s: Callable[[], float], tick_s: float, look: Callable[[float], None]
) -> None:
    """Until `closed`, tell `look` every tick for how long nothing has moved. `last_move_s`: when something did, as
    `time.monotonic()` has it."""
    since_s = seen_s = time.monotonic()
    while not closed.wait(tick_s):
        now = time.monotonic()
        if now - seen_s > 5 * tick_s:
            since_s = now  # the whole process was stopped for a while, which is no fault of its own
        seen_s, since_s = now, max(since_s, last_move_s())
        look(now - since_s)


def end_process(last_words: Callable[[], None]) -> None:
    last = threading.Thread(target=last_words, daemon=True)
    last.start()
    last.join(LAST_WORDS_S)
    os._exit(EXIT_CODE)  # not sys.exit: the main thread would have to move


def forget(run_dir: Path) -> None:
    """Take away what the ranks of an earlier pool said."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def last_words(run_dir: Path, num_ranks: int) -> str:
    """What the ranks that gave up had to say, as far as they did."""
    records = (_read(run_dir / FOLDER, rank) for rank in range(num_ranks))
    texts = (str(record["text"]) for record in records if record is not None)
    return "; ".join(text.removeprefix(GAVE_UP) for text in texts if text.startswith(GAVE_UP))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _read(folder: Path, rank: int) -> dict[str, Any] | None:
    try:
        return json.loads(_file(folder, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
