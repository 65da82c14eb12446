"""Ends what Ray would leave behind. Its server and its scheduler die with a driver that is killed, its workers soon after;
its agents first try for a minute to report that. The reaper is a process of its own, for a killed driver can do nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

PROC = Path("/proc")


class Reaper:
    """Waits until `close`, or until this process has ended in whatever way. `session`: Ray's directory of logs and sockets."""

    def __init__(self, session: str):
        command = [sys.executable, "-S", "-E", __file__, session]
        # A session of its own: what ends the job's other processes does not end this one.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def close(self) -> None:
        self.process.communicate()


def processes_of(session: str) -> list[int]:
    """Ray's processes, which all call themselves ray::SOMETHING, that hold a file of this session open. (Their titles are
    written over their environment, where a mark would be lost.)"""
    numbered = [entry for entry in PROC.iterdir() if entry.name.isdigit()]
    return [int(entry.name) for entry in numbered if _is_of(session, entry)]


def _is_of(session: str, process: Path) -> bool:
    try:
        if not (process / "cmdline").read_bytes().startswith(b"ray::"):
            return False
        return any(os.path.realpath(file).startswith(f"{session}/") for file in (process / "fd").iterdir())
    except OSError:  # it has just ended, or is another user's
        return False


def main(session: str) -> None:
    sys.stdin.read()  # until the driver, which alone holds the other end, closes it or is gone
    while pids := processes_of(session):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


if __name__ == "__main__":
    main(sys.argv[1])
