"""`llmscale logs RUN`: what the processes of an attempt have written, a file for each node and role, one after the other."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from llmscale.errors import RunError
from llmscale.launch.status import find, look

POLL_S = 0.5


def show(path: Path, role: str | None, attempt: int | None, as_json: bool) -> int:
    run = find(path)
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
    positions: dict[Path, int] = {}
    shown: Path | None = None
    while True:
        lives = look(run).state in ("running", "queued")
        for file, text in _news(run, role, attempt, positions):
            if file != shown:
                print(f"==> {file} <==")
            shown = file
            sys.stdout.write(text)
        sys.stdout.flush()
        if not lives:
            return 0
        time.sleep(POLL_S)


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
