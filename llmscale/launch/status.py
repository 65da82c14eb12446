"""`llmscale status [RUN]` and `llmscale runs [DIR]`: how runs are. The run directory is the truth, on any machine that sees it;
only whether a job still waits or lives is Slurm's or Kubernetes' to say, where it can be asked. A run on a volume of Kubernetes
may have no more here than its config: then all that is known is what the cluster says."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmscale.checkpoint.run_directory import holder, read_result, run_id
from llmscale.errors import ClusterError, Requeue, RunError
from llmscale.launch import kubernetes, local, slurm
from llmscale.launch.attempts import all_attempts, cancel_file
from llmscale.tracking.jsonl import METRICS, read_jsonl

SUBMISSION = "submission.json"  # below launch/
SHOWN = re.compile(r"^(?:train/loss|reward/mean|eval/loss|eval/accuracy|eval/reward/mean)$")
MAX_LINES = 40  # of a traceback
ELSEWHERE = "lost contact with the other ranks"  # the failure of another rank


@dataclass(frozen=True)
class Submission:
    """How a run was started, last."""

    launch: str
    job: str  # Slurm's number, the pid of the script, or NAMESPACE/KIND/NAME[@CONTEXT]
    host: str
    submitted_s: float
    stage: str
    overrides: list[str]
    launch_overrides: list[str]
    config_dir: str | None
    plugins: list[str]
    folder: str  # the working directory


@dataclass(frozen=True)
class Status:
    run: str
    id: str
    state: str  # done, running, queued, stopped, cancelled, failed, lost, or new
    launch: str | None
    job: str | None
    reason: str  # why a job waits, in Slurm's words, or why an attempt ended
    attempt: int
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    exit_code: int | None = None
    traceback: str | None = None  # the first one of the last attempt, when that failed
    age_s: float | None = None  # since the last record


def look(run: Path) -> Status:
    """Raises: RunError when there is no run here."""
    run = find(run)
    submission, attempts, result = submission_of(run), all_attempts(run), read_result(run)
    number = max(attempts, default=0)
    last = attempts.get(number, {})
    job = last.get("job", "") if submission is None else submission.job
    state, reason = _state(run, submission, last, result)
    ended = state == "failed"
    metrics, step, age_s = _progress(run)
    return Status(
        str(run), run_id(run), state, _launch(submission, last), job or None, reason, number, step, metrics,
        None if state in ("running", "queued", "done") else last.get("exit_code"),
        first_traceback(run / "attempts" / str(number)) if ended else None, age_s,
    )  # fmt: skip


def find(run: Path) -> Path:
    """The run directory that a user means by it: itself, or the only one below it."""
    if (run / "run.json").exists():
        return run
    below = sorted(file.parent for file in run.glob("*/run.json"))
    if len(below) == 1:
        return below[0]
    listed = f"Name one of: {', '.join(map(str, below))}." if below else "llmscale runs lists what there is."
    raise RunError("there are several runs here" if below else "there is no run here", where=str(run), fix=listed)


def submission_of(run: Path) -> Submission | None:
    """None for a run whose stage was started by its own command."""
    file = find(run) / "launch" / SUBMISSION
    return Submission(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def _launch(submission: Submission | None, last: dict[str, Any]) -> str | None:
    if submission is not None:
        return submission.launch
    by_hand = re.fullmatch(r"\d+(_\d+)?", str(last.get("job", "")))  # its script was given to sbatch
    return "slurm" if by_hand else None


def _state(
    run: Path, submission: Submission | None, last: dict[str, Any], result: dict[str, Any] | None
) -> tuple[str, str]:
    """The state, and why."""
    if submission is not None and submission.launch == "kubernetes" and result is None:
        return _state_in_pods(run, submission, last)
    known = None
    job = submission.job if submission else str(last.get("job", ""))
    if _launch(submission, last) == "slurm":
        known = slurm.state_of(job)
    if result is not None:
        return "done", ""
    if known is not None and known.queued:
        return "queued", known.reason
    if (known is not None and known.running) or holder(run) is not None or local.is_alive(run):
        return "running", ""
    if submission is not None and submission.launch == "slurm" and known is None and not last:
        return "unknown", "Slurm cannot be asked from here"
    if known is not None and last.get("job") != job and not cancel_file(run).exists():
        return "failed", f"it ended before an attempt began: {known.state}, {known.reason}"
    if _launch(submission, last) == "slurm" and known is None and last.get("again"):
        return "queued", "it goes on as soon as it gets nodes"
    return _how_it_ended(run, last)


def _state_in_pods(run: Path, submission: Submission, last: dict[str, Any]) -> tuple[str, str]:
    try:
        known = kubernetes.state_of(kubernetes.Place.from_text(submission.job))
    except ClusterError:
        if not last:  # nothing is seen of it here
            raise
        return ("running", "") if holder(run) is not None else _how_it_ended(run, last)
    if known is not None and (known.state in ("queued", "running") or not last):
        return known.state, known.reason
    if known is None and not last and not cancel_file(run).exists():
        return "lost", "the cluster knows it no more, and its run directory is not seen from here"
    return _how_it_ended(run, last)


def _how_it_ended(run: Path, last: dict[str, Any]) -> tuple[str, str]:
    cancelled = cancel_file(run).exists()
    if not last or "exit_code" not in last:
        return ("cancelled", "") if cancelled else ("lost", "it ended without a word") if last else ("new", "")
    if cancelled and last["exit_code"] != 1:
        return "cancelled", "saved" if last["exit_code"] == Requeue.exit_code else ""
    stopped = last["exit_code"] == Requeue.exit_code
    return "stopped" if stopped else "failed", last.get("why", "")


def _progress(run: Path) -> tuple[dict[str, float], int, float | None]:
    file = run / METRICS
    records = read_jsonl(file) if file.exists() else []
    if not records:
        return {}, 0, None
    last: dict[str, float] = {}
    for record in records:
        last |= {name: value for name, value in record.items() if SHOWN.match(name)}
    return last, records[-1]["step"], round(time.time() - file.stat().st_mtime, 1)


def first_traceback(attempt: Path) -> str | None:
    """What the process that failed first has said, with the file where it stands."""
    found = [(file, text) for file in sorted(attempt.glob("*.log")) if (text := _complaint(file))]
    own = [(file, text) for file, text in found if ELSEWHERE not in text] or found
    return f"{own[0][0]}:\n{own[0][1]}" if own else None


def _complaint(file: Path) -> str | None:
    lines = [re.sub(r"^\d+: ", "", line) for line in file.read_text(errors="replace").splitlines()]
    begin = next((i for i, line in enumerate(lines) if line.startswith(("Traceback (most recent", "error: "))), None)
    if begin is None:
        return None
    if lines[begin].startswith("error: "):
        follow = (i for i in range(begin + 1, len(lines)) if not lines[i].startswith("  "))
        return "\n".join(lines[begin : next(follow, len(lines))])
    end = next((i for i in range(begin + 1, len(lines)) if not lines[i].startswith(" ")), len(lines) - 1)
    return "\n".join(lines[begin : end + 1][-MAX_LINES:])


# ---------------------------------------------------------------- the verbs


def all_runs(folder: Path) -> list[Path]:
    """Every run below a folder, the one that has changed last first."""
    found = [file.parent for file in folder.rglob("run.json")]
    return sorted(found, key=_changed_s, reverse=True)


def _changed_s(run: Path) -> float:
    files = (run / METRICS, run / "launch" / SUBMISSION, run / "run.json")
    return max(file.stat().st_mtime for file in files if file.exists())


def show(path: Path | None, as_json: bool) -> int:
    """`llmscale status`."""
    found = look(path if path is not None else _newest())
    if as_json:
        print(json.dumps(asdict(found)))
        return 0
    print(f"{found.run}  {found.state}{f' ({found.reason})' if found.reason else ''}")
    job = f"{found.launch} job {found.job}" if found.launch else f"started by hand on {socket.gethostname()}"
    code = f", exit code {found.exit_code}" if found.exit_code is not None else ""
    print(f"  {found.id}: {job}, attempt {found.attempt}{code}")
    if found.metrics:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
        print(f"  step {found.step}: {numbers}; {found.age_s:.0f} s ago")
    if found.traceback:
        print("\n".join(f"  {line}" for line in found.traceback.splitlines()))
    for verb in _next(found.state):
        print(f"  llmscale {verb} {found.run}")
    return 0


def _next(state: str) -> Sequence[str]:
    if state in ("running", "queued"):
        return ("logs -f", "cancel")
    return () if state == "done" else ("logs", "resume")


def _look_or_say(run: Path) -> Status:
    """One cluster that does not answer must not hide the other runs."""
    try:
        return look(run)
    except ClusterError as error:
        submission = submission_of(run)
        job = submission.job if submission else None
        return Status(str(run), run_id(run), "unknown", "kubernetes", job, error.what, 0, 0)


def _newest() -> Path:
    found = all_runs(Path("runs"))
    if not found:
        raise RunError("there is no run here", where="runs", fix="Name a run directory: llmscale status RUN.")
    return found[0]


def list_runs(folder: Path, as_json: bool) -> int:
    """`llmscale runs`."""
    found = [_look_or_say(run) for run in all_runs(folder)]
    if as_json:
        print(json.dumps([asdict(status) for status in found]))
        return 0
    if not found:
        print(f"no run below {folder}")
    width = max((len(status.run) for status in found), default=0)
    for status in found:
        job = f"{status.launch} {status.job}" if status.launch else ""
        print(f"{status.run:<{width}}  {status.state:<9}  step {status.step:<6}  {job}".rstrip())
    return 0
