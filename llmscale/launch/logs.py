"""`llmscale logs RUN`: what the processes of an attempt have written, a file for each node and role, one after the other. Of a
run on Kubernetes whose directory is not seen from here, the logs of its pods."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llmscale.errors import RunError
from llmscale.launch import kubernetes
from llmscale.launch.status import find, look, submission_of

POLL_S = 0.5
POLL_PODS_S = 3.0


def show(path: Path, role: str | None, attempt: int | None, as_json: bool) -> int:
    run = find(path)
    if (place := _elsewhere(run, attempt)) is not None:
        return _show_pods(place, role, as_json)
    files = _files(run, role, attempt if attempt is not None else _newest(run))
    if not files:
        _explain_none(run, role, attempt)
    if as_json:
        print(json.dumps({str(file): file.read_text(errors="replace") for file in files}))
        return 0
    for file in files:
        print(f"==> {file} <==\n{file.read_text(errors='replace')}", flush=True)
    return 0


def follow(path: Path, role: str | None, attempt: int | None) -> int:
    """Until the run has ended. A new attempt is followed too, unless one was named."""
    run = find(path)
    place = _elsewhere(run, attempt)
    positions: dict[Path, int] = {}
    seen: dict[str, str] = {}
    shown: Path | str | None = None
    while True:
        lives = look(run).state in ("running", "queued")
        news = _news(run, role, attempt, positions) if place is None else kubernetes.logs(place, role, seen)
        for file, text in news:
            if file != shown:
                print(f"==> {file} <==")
            shown = file
            sys.stdout.write(text)
        sys.stdout.flush()
        if not lives:
            return 0
        time.sleep(POLL_S if place is None else POLL_PODS_S)


def _elsewhere(run: Path, attempt: int | None) -> kubernetes.Place | None:
    """Where its pods are, when nothing of its attempts is seen here."""
    submission = submission_of(run)
    if submission is None or submission.launch != "kubernetes" or _newest(run):
        return None
    if attempt is not None:
        fix = "Leave --attempt out: pods have the logs of the present one. All are on the volume."
        raise RunError("the run directory is not seen from here", where=str(run), fix=fix)
    return kubernetes.Place.from_text(submission.job)


def _show_pods(place: kubernetes.Place, role: str | None, as_json: bool) -> int:
    found = dict(kubernetes.logs(place, role, {}))
    if not found:
        fix = "If it has ended, they are on its volume, in attempts/ of the run directory; llmscale status says how it is."
        raise RunError(f"no pod of {place} has a log", fix=fix)
    print(json.dumps(found) if as_json else "\n".join(f"==> {pod} <==\n{text}" for pod, text in found.items()))
    return 0


def _news(run: Path, role: str | None, attempt: int | None, positions: dict[Path, int]) -> Iterator[tuple[Path, str]]:
    for file in _files(run, role, attempt if attempt is not None else _newest(run)):
        with file.open("rb") as opened:
            opened.seek(positions.get(file, 0))
            whole, newline, _ = opened.read().rpartition(b"\n")  # a line that is still being written comes next time
        positions[file] = positions.get(file, 0) + len(whole) + len(newline)
        if newline:
            yield file, (whole + newline).decode(errors="replace")


def _newest(run: Path) -> int:
    return max((int(f.name) for f in (run / "attempts").glob("*") if f.name.isdigit()), default=0)


def _files(run: Path, role: str | None, attempt: int) -> list[Path]:
    """driver-node1.log, trainer-0.log, ...; and `job`, the script's own, which all attempts share."""
    files = sorted((run / "attempts" / str(attempt)).glob("*.log"))
    files += [run / "launch" / "job.log"] if (run / "launch" / "job.log").exists() else []
    return [file for file in files if role in (None, role_of(file))]


def role_of(file: Path) -> str:
    return file.stem.partition("-")[0]


def _explain_none(run: Path, role: str | None, attempt: int | None) -> None:
    number = attempt if attempt is not None else _newest(run)
    roles = sorted({role_of(file) for file in _files(run, None, number)})
    numbers = sorted(int(f.name) for f in (run / "attempts").glob("*") if f.name.isdigit())
    what = f"attempt {number} has no log" + (f" of {role}" if role else "")
    fix = f"It has: {', '.join(roles)}." if roles else f"There are attempts {', '.join(map(str, numbers)) or '- none'}."
    raise RunError(what, where=str(run), fix=fix)
