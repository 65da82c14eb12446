"""`llmscale cancel RUN [--now]`: end a run wherever it is. It saves after its step and can be resumed; `--now` loses what was
done since the last checkpoint."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

from llmscale.checkpoint.run_directory import holder
from llmscale.errors import LlmscaleError, RunError
from llmscale.launch import kubernetes, local, slurm
from llmscale.launch.attempts import cancel_file
from llmscale.launch.status import Status, Submission, find, look, submission_of

WAIT_S = 20.0


def cancel(path: Path, now: bool) -> Status:
    """Returns the status after it. Raises: RunError when it does not run, or runs where it cannot be reached."""
    run = find(path)
    before, submission = look(run), submission_of(run)
    if before.state not in ("running", "queued"):
        fix = "" if before.state == "done" else f"llmscale resume {run} goes on with it."
        raise RunError(f"this run is {before.state}, not running", where=str(run), fix=fix or None)
    cancel_file(run).parent.mkdir(exist_ok=True)
    cancel_file(run).touch()  # first: the job looks for it before it goes back into the queue
    try:
        if before.launch == "slurm" and before.job is not None:
            slurm.scancel(before.job, None if now or before.state == "queued" else "USR1")
        elif before.launch == "kubernetes" and before.job is not None:
            kubernetes.cancel(kubernetes.Place.from_text(before.job), now)
        else:
            _end_here(run, submission, now)
    except LlmscaleError:  # it could not be reached, and goes on
        cancel_file(run).unlink(missing_ok=True)
        raise
    deadline = time.monotonic() + WAIT_S
    while now and look(run).state in ("running", "queued") and time.monotonic() < deadline:
        time.sleep(0.2)
    return look(run)


def _end_here(run: Path, submission: Submission | None, now: bool) -> None:
    driver = holder(run)
    host = submission.host if submission is not None else driver[1] if driver else socket.gethostname()
    if host != socket.gethostname():
        raise RunError(f"this run is on {host}", where=str(run), fix="Give the command there.")
    if submission is not None and local.is_alive(run):
        local.end(int(submission.job), driver[0] if driver else None, now)
    elif driver:
        with suppress(ProcessLookupError):
            os.kill(driver[0], signal.SIGKILL if now else signal.SIGTERM)
