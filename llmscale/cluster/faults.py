"""What a fault on purpose does, where it happens: to processes, links and disks. Which and when is in chaos.py."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NET_ADMIN = 12  # the number of the capability, see capabilities(7)
MOST_FILLED_BYTES = 1 << 30  # a larger disk is not filled: it is likely not the run's alone


def hurt(pid: int, action: str, delay_s: float) -> None:
    """On the process's host: kill it, stop it for good, or for `delay_s`."""
    try:
        os.kill(pid, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
        if action == "delay":
            time.sleep(delay_s)
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:  # another fault was faster
        return


def cut(address: str, seconds: float) -> None:
    """On the host with this address: from now on nothing leaves the interface that has it, so that nobody can talk to the host.
    What is sent is not refused, as where a cable is pulled at a switch.

    Raises: OSError or CalledProcessError where that cannot be done.
    """
    listed = subprocess.run(
        ["ip", "-o", "-4", "address", "show", "to", address], check=True, capture_output=True, text=True
    )
    if not listed.stdout:
        raise OSError(f"no interface has the address {address}")
    interface = listed.stdout.split()[1]
    # Whoever runs this may be ended by Ray, whose other end hears nothing more of it. The link has to come back all the same.
    mend = f"sleep {seconds}; tc qdisc delete dev {interface} root"
    subprocess.run(["tc", "qdisc", "replace", "dev", interface, "root", "blackhole"], check=True)
    subprocess.run(["sh", "-c", f"({mend}) </dev/null >/dev/null 2>&1 &"], check=True, start_new_session=True)


def cannot_cut() -> str | None:
    """Why this user cannot cut links; None where that is possible."""
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"there is no {' and no '.join(missing)} (iproute2)"
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")), 16)
    return None if held >> NET_ADMIN & 1 else "this user lacks CAP_NET_ADMIN"


@contextmanager
def filled(directory: Path) -> Iterator[int]:
    """All that is free on the file system of a directory is taken, as long as the context is open; gives how many bytes. The
    file that takes them has no name, so that they come back also where this process is killed."""
    with tempfile.TemporaryFile(dir=directory) as file:
        taken, piece = 0, 1 << 30
        while piece:
            try:
                os.posix_fallocate(file.fileno(), taken, piece)
                taken += piece
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                piece //= 2
        yield taken


def cannot_fill(directory: Path) -> str | None:
    """Why the disk of a directory, which need not be there yet, is not filled; None where it may be."""
    there = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    size = shutil.disk_usage(there).total
    if size <= MOST_FILLED_BYTES:
        return None
    return f"the disk of {directory} has {size / 1e9:.0f} GB, so that others may use it too"
