"""What runs in the pods of a job on Kubernetes. `python -m llmscale.launch.pod run RUN MAX_RETRIES COMMAND ...` keeps the
books of an attempt round the command of a rank's node or of RLHF's driver; `... leave RUN` is what a pod of Ray does before it
is taken away: it lets the driver save.

The environment says which pod it is: LLMSCALE_JOB the job, LLMSCALE_START which start of it, PET_NODE_RANK (torchrun's) the
node.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from llmscale.checkpoint.run_directory import ATTEMPT_DIR, is_locked
from llmscale.errors import LlmscaleError, Requeue
from llmscale.launch.attempts import RESULT, begin, begun_by, end, read

JOB, START, NODE = "LLMSCALE_JOB", "LLMSCALE_START", "PET_NODE_RANK"
LOG = "LLMSCALE_POD_LOG"  # a file that gets the output too: Ray keeps that of a driver from the log of its pod
DRIVER_PID = Path(tempfile.gettempdir()) / "llmscale-driver.pid"  # of this pod alone
VERDICT_S = 60.0  # longest wait for the first node to say whether there is another attempt
POLL_S = 0.5


def run(run_dir: Path, max_retries: int, command: Sequence[str]) -> int:
    """Returns the pod's exit code: 75 when the job is to start the same command again, else another one below 128."""
    if (run_dir / RESULT).exists():
        return 0
    job, start, node = (os.environ.get(name, "") for name in (JOB, START, NODE))
    is_driver, is_first = node == "", node in ("", "0")
    if is_first:
        (run_dir / "launch").mkdir(parents=True, exist_ok=True)
        attempt = begin(run_dir, job, [socket.gethostname()], max_retries, start)
    else:
        attempt = _wait_for_attempt(run_dir, job, start)
    os.environ[ATTEMPT_DIR] = str(attempt)
    if is_driver:
        DRIVER_PID.write_text(str(os.getpid()))
    code, asked = _run(command, attempt / f"{'driver' if is_driver else 'trainer'}-{socket.gethostname()}.log")
    if is_driver:
        DRIVER_PID.unlink(missing_ok=True)
    elif asked and code == 1:
        code = 128 + signal.SIGTERM  # torchrun was ended, and does not say how its ranks did
    if is_first:
        end(attempt, code, "asked" if asked else None)
    record = _ended(attempt)
    if record.get("again"):
        return Requeue.exit_code
    code = record.get("exit_code", code)
    return (
        1 if code == Requeue.exit_code or code >= 128 else code
    )  # Kubernetes must not take it for an end from outside


def _run(command: Sequence[str], log: Path) -> tuple[int, bool]:
    """Its exit code as a shell has it, and whether it was asked to end."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:  # whoever stops a Ray job and the pod's own end may both ask, and a second time means at once
            process.terminate()
        asked = True

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, stop)
    assert process.stdout is not None
    with ExitStack() as files:
        outputs: list[TextIO] = [sys.stdout, files.enter_context(log.open("a", encoding="utf-8"))]
        with suppress(OSError):  # it is for reading along only
            outputs += [files.enter_context(open(os.environ[LOG], "a"))] if LOG in os.environ else []
        for line in process.stdout:
            for output in outputs:
                with suppress(OSError):  # a full disk, or nobody who reads: the command goes on
                    output.write(line)
                    output.flush()
    code = process.wait()
    return (128 - code if code < 0 else code), asked


def _wait_for_attempt(run_dir: Path, job: str, start: str) -> Path:
    """Raises: TimeoutError where the first node does not come up. Without it the ranks would only wait for one another."""
    deadline = time.monotonic() + 10 * VERDICT_S
    while (found := begun_by(run_dir, job, start)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the first node has begun no attempt in {run_dir}: is that folder on a shared volume?")
        time.sleep(POLL_S)
    return found


def _ended(attempt: Path) -> dict[str, Any]:
    """The attempt's record, when the first node has closed it, or is late."""
    deadline = time.monotonic() + VERDICT_S
    while "again" not in (record := read(attempt)) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return record


def leave(run_dir: Path) -> int:
    """Ask the driver, where it runs in this pod, to save and end; elsewhere stay until it has, for it needs its workers to get
    to the end of a step. Kubernetes waits no longer than the pod's grace period."""
    with suppress(OSError, ValueError):
        os.kill(int(DRIVER_PID.read_text()), signal.SIGTERM)
    while is_locked(run_dir / ".lock"):
        time.sleep(POLL_S)
    return 0


def main(arguments: Sequence[str]) -> int:
    verb, path, *rest = arguments
    return leave(Path(path)) if verb == "leave" else run(Path(path), int(rest[0]), rest[1:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (LlmscaleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
