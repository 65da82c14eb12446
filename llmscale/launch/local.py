"""Runs that are detached on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from llmscale.checkpoint.run_directory import is_locked

START_S = 10.0


def start(script: Path) -> str:
    """Run it in a session of its own, so that it hears nothing of this shell's end; returns its pid."""
    process = subprocess.Popen(
        ["bash", str(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + START_S
    while process.poll() is None and not is_alive(script.parent.parent) and time.monotonic() < deadline:
        time.sleep(0.02)  # until it holds its lock, by which `status` knows it
    return str(process.pid)


def is_alive(run: Path) -> bool:
    return is_locked(run / "launch" / "lock")


def end(pid: int, driver: int | None, now: bool) -> None:
    """Ask the job's script, which passes it on; `now`: kill its whole group, and a driver that has left that."""
    with suppress(ProcessLookupError):
        if now:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGTERM)
    if now and driver is not None:
        with suppress(ProcessLookupError):
            os.kill(driver, signal.SIGKILL)
